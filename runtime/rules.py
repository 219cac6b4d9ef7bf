"""Rules for the inputs, outputs and attributes of an operator, used by `vqdeploy.runtime.operators`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ints:
    """Integers from `low` to `high`."""

    low: int
    high: int
    kind = "INT"

    def allows(self, value: int) -> bool:
        """Whether the rule accepts a value."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class OneOf:
    """One of several values."""

    values: tuple[object, ...]
    kind: str

    def allows(self, value: object) -> bool:
        """Whether the rule accepts a value."""
        return value in self.values


def Strings(*values: str) -> OneOf:  # noqa: N802 (beside Ints and Floats)
    """One of several strings."""
    return OneOf(tuple(value.encode() for value in values), "STRING")


@dataclass(frozen=True)
class Floats:
    """Any float but NaN."""

    kind = "FLOAT"

    def allows(self, value: float) -> bool:
        """Whether the rule accepts a value."""
        return not math.isnan(value)


@dataclass(frozen=True)
class Matching:
    """Strings that match a pattern."""

    pattern: re.Pattern[bytes]
    kind = "STRING"

    def allows(self, value: bytes) -> bool:
        """Whether the rule accepts a value."""
        return self.pattern.fullmatch(value) is not None


@dataclass(frozen=True)
class List:
    """At most `most` values that each follow a rule."""

    each: Ints | Floats
    most: int = 4096

    @property
    def kind(self) -> str:
        """The attribute type of ONNX."""
        return f"{self.each.kind}S"

    def allows(self, value: Sequence[int]) -> bool:
        """Whether the rule accepts a value."""
        return len(value) <= self.most and all(map(self.each.allows, value))


@dataclass(frozen=True)
class Inner:
    """A graph or a tensor, which is checked separately."""

    kind: str

    def allows(self, value: object) -> bool:
        """Whether the rule accepts a value."""
        return True


Rule = Ints | OneOf | Floats | Matching | List | Inner

FLAG, AXIS, ANY = Ints(0, 1), Ints(-8, 7), Ints(-(2**63), 2**63 - 1)
FLOAT, GRAPH, TENSOR = Floats(), Inner("GRAPH"), Inner("TENSOR")
DTYPES = OneOf((1, 2, 3, 6, 7, 9, 10, 11, 16, 21, 22), "INT")
"""ONNX numbers of float32, uint8, int8, int32, int64, bool, float16, float64, bfloat16, uint4 and int4."""
EQUATION = Matching(re.compile(rb"[A-Za-z., ]{1,64}(->[A-Za-z. ]{0,32})?"))


@dataclass(frozen=True)
class Operator:
    """Inputs and outputs by name; `?` marks optional ones, `*` a variadic one, `-?` is one that is never given."""

    inputs: str
    outputs: str
    attributes: dict[str, Rule] = field(default_factory=dict)
    required: tuple[str, ...] = ()
