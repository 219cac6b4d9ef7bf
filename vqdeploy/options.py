"""The sampling options: one table for validation, the command line and the README."""

import math
import sys
from dataclasses import dataclass

from vqdeploy.errors import VqdeployError

_STRONGEST = 1000  # guidance: with it the outputs of a prior still fit fp16
_HOTTEST = 1e6  # far below the limits of fp32 and of the confidence of known codes


@dataclass(frozen=True)
class SamplingOption:
    """A sampling option.

    Args:
        name: Name in Python and in manifests, such as `guidance_scale`.
        type: `int`, `float` or `str`.
        help: One sentence.
        low: Smallest value.
        high: Largest value; infinity for no limit, None for the size of the codebook.
        per_depth: Whether it may have one value per depth or level.
        choices: The values of a `str`.
        aliases: Further spellings on the command line.
    """

    name: str
    type: type[int] | type[float] | type[str]
    help: str
    low: float = 0
    high: float | None = math.inf
    per_depth: bool = False
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        """Spellings on the command line, the usual one first."""
        return ("--" + self.name.replace("_", "-"), *self.aliases)

    @property
    def values(self) -> str:
        """The valid values, as text."""
        if self.choices:
            return ", ".join(self.choices)
        if (self.type, self.low, self.high) == (int, 0, 1):
            return "0 or 1"
        if self.high is None:
            return f"{self.low:g}..codebook size"
        return f"{self.low:g}..{self.high:.0f}" if math.isfinite(self.high) else f"{self.low:g} or more"

    def check(self, value: object, codebook_size: int) -> None:
        """Rejects a value of the wrong kind or out of range.

        Raises:
            VqdeployError: It names the option, and what was expected.
        """
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise VqdeployError(f"there is no such {self.name}", expected=" or ".join(self.choices), found=value)
            return
        if not isinstance(value, int | float):
            raise VqdeployError(f"{self.name} is malformed", expected="a number", found=value)
        low, high = self.low, codebook_size if self.high is None else self.high
        if not low <= value <= min(high, sys.float_info.max):  # NaN fails too
            expected = f"{low}..{high}" if math.isfinite(high) else f"a finite number of {low} or more"
            raise VqdeployError(f"{self.name} is out of range", expected=expected, found=value)
        if self.type is int and value % 1:
            raise VqdeployError(f"{self.name} is malformed", expected="an integer", found=value)


SAMPLING_OPTIONS = (
    SamplingOption("temperature", float, "Divides the logits; 0 takes the most likely code.", per_depth=True),
    SamplingOption("top_k", int, "Keeps the k most likely codes; 0 keeps all.", high=None, per_depth=True),
    SamplingOption("top_p", float, "Keeps the most likely codes up to this probability.", high=1, per_depth=True),
    SamplingOption(
        "guidance_scale",
        float,
        "Strength of classifier-free guidance; 1 is none. For VAR it is 1 + its public cfg.",
        high=_STRONGEST,
        aliases=("--cfg-scale",),
    ),
    SamplingOption(
        "guidance_interval",
        int,
        "A value of i guides only the codes 0 to i + 1; -1 guides all.",
        low=-1,
        high=10_000_000,
        aliases=("--cfg-interval",),
    ),
    SamplingOption(
        "steps",
        int,
        "Steps of a masked prior, one engine call each.",
        low=1,
        high=10_000,
        aliases=("--num-inference-steps",),
    ),
    SamplingOption(
        "schedule",
        str,
        "How the number of masked codes falls from step to step.",
        choices=("cosine", "linear", "square", "cubic", "exp", "log", "arccos", "halton"),
    ),
    SamplingOption(
        "more_smooth", int, "1 blends code vectors instead of drawing codes, for smoother images (VAR).", high=1
    ),
    SamplingOption(
        "choice_temperature", float, "Scale of the noise on the confidence of a masked prior.", high=_HOTTEST
    ),
)

OPTIONS = {option.name: option for option in SAMPLING_OPTIONS}
"""The same, by name."""


def check_names(names: set[str]) -> None:
    """Rejects a name that is not in the table.

    Raises:
        VqdeployError: An option of a later version.
    """
    if unknown := sorted(names - set(OPTIONS)):
        raise VqdeployError(f"unknown option {unknown[0]}", fix="pip install -U vqdeploy")
