"""Maps weights under public names to our models: every weight must be used and none may be missing."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.errors import ArtifactError, VqdeployError

_SHOWN = 3  # names listed in an error
_WHOLE = "an integer"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """An imported tokenizer or prior.

    Attributes:
        model: Name of its system.
        config: Its configuration.
        weights: Its state_dict.
        notes: Messages for the user.
        sampling: Sampling options of its publishers.
        tokenizer: Of a prior: the configuration of its tokenizer, if the prior decides a part of it.
        lacking: Of a tokenizer: what is wrong if no prior decides that part.
    """

    model: str
    config: Any
    weights: Weights
    notes: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    lacking: VqdeployError | None = None


def fit(
    source: Source,
    make: Callable[[], nn.Module],
    public: Callable[[str], str],
    given: Mapping[str, Tensor] | None = None,
    ignored: str = "(?!)",
) -> Weights:
    """The state_dict of a model, with weights looked up by public names.

    Trailing dimensions of 1 are ignored: a linear layer equals a 1x1 convolution.

    Args:
        source: The weights.
        make: Makes the model, on the meta device.
        public: Maps our names to public names.
        given: Weights that are computed otherwise, by our names.
        ignored: Pattern of public names that are not weights of the model.

    Raises:
        ArtifactError: Weights are missing, left over, or of the wrong shape.
    """
    with torch.device("meta"):
        expected = make().state_dict()
    weights, missing, used = dict(given or {}), [], set()
    for name, meta in expected.items():
        if name not in weights:
            used.add(key := public(name))
            if key in source.weights:
                weights[name] = source.weights[key]
            else:
                missing.append(key)
                continue
        weights[name] = _shaped(source, public(name), weights[name], meta)
    over = [key for key in source.weights if key not in used and not re.search(ignored, key)]
    if missing or over:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(over)}, which are unused"] * bool(over)
        raise ArtifactError(f"{source.path} {' and '.join(parts)}")
    return {name: weights[name] for name in expected}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shaped(source: Source, key: str, weight: Tensor, meta: Tensor) -> Tensor:
    if weight.layout != torch.strided or weight.is_quantized:
        raise ArtifactError(f"{key} in {source.path} is not a plain tensor")
    if meta.is_floating_point() and weight.dtype not in _FLOATS:
        raise ArtifactError(
            f"{key} in {source.path} has the wrong type", expected="floats of 16 to 64 bits", found=weight.dtype
        )
    if _squeezed(weight) != _squeezed(meta):
        raise ArtifactError(
            f"{key} in {source.path} has the wrong shape", expected=list(meta.shape), found=list(weight.shape)
        )
    return weight.reshape(meta.shape)


def _squeezed(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def submodel(source: Source, prefix: str, config: str) -> Source:
    """The weights with a prefix, and the configuration under a key."""
    weights = {key.removeprefix(prefix): w for key, w in source.weights.items() if key.startswith(prefix)}
    inner = next((value for key, value in _entries(source.config) if key == config), source.config)
    return replace(source, weights=weights, config=inner)


def section(config: object, *keys: str) -> dict[str, Any]:
    """The first section of a configuration with all of these keys; empty without one."""
    if isinstance(config, dict) and set(keys) <= set(config):
        return config
    return next((value for _, value in _entries(config) if isinstance(value, dict) and set(keys) <= set(value)), {})


def _entries(config: object) -> Iterator[tuple[Any, Any]]:
    """All entries of a configuration, from all sections."""
    seen, left = set(), [config]
    while left:
        node = left.pop(0)
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            yield from node.items()
        left += node.values() if isinstance(node, dict) else node


def number(values: Mapping[str, Any], key: str, expected: str = "a number") -> float | None:
    """A number of a configuration, which may be given as text; None if missing.

    Raises:
        ArtifactError: It is not a finite number, or not of the `expected` kind.
    """
    value = values.get(key)
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or (expected == _WHOLE and found % 1):
        shown = repr(value) if isinstance(value, str) else value
        raise ArtifactError(f"{key} of the configuration is malformed", expected=expected, found=shown)
    return found


def whole(values: Mapping[str, Any], key: str) -> int | None:
    """An integer of a configuration, likewise.

    Raises:
        ArtifactError: It is not an integer.
    """
    found = number(values, key, _WHOLE)
    return None if found is None else int(found)


def need(value: int | None, key: str, source: Source, option: str) -> int:
    """A number that cannot be inferred from the weights.

    Raises:
        VqdeployError: It is missing from the configuration too.
    """
    if value is None:
        raise VqdeployError(
            f"{key} cannot be read off the weights in {source.path}", fix=f"add {option} FILE, a YAML that gives {key}"
        )
    return value


def check(source: Source, declared: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Rejects a configuration that contradicts the weights.

    Args:
        source: The weights.
        declared: Values of the public configuration by name, None if missing.
        found: The same values, inferred from the weights.

    Raises:
        ArtifactError: It names the first value that differs.
    """
    for key, value in declared.items():
        if value is not None and value != found[key]:
            raise ArtifactError(
                f"the configuration is not that of {source.path}: {key} differs", expected=found[key], found=value
            )


def count(source: Source, name: Callable[[int], str]) -> int:
    """Number of consecutively numbered names, from 0."""
    i = 0
    while name(i) in source.weights:
        i += 1
    return i


def learned(codebook: Tensor) -> Weights:
    """Initial buffers of an `AveragedCodebook` for a codebook without moving averages, by our names."""
    ones = torch.ones(len(codebook))
    return {
        "quantizer.codebook": codebook,
        "quantizer.embed_ema": codebook,
        "quantizer.cluster_size_ema": ones,
    }


def shape(source: Source, key: str) -> list[int]:
    """The shape of a weight.

    Raises:
        ArtifactError: It is missing.
    """
    if key not in source.weights:
        raise ArtifactError(f"{source.path} lacks {key}")
    return list(source.weights[key].shape)


def take(source: Source, key: str) -> Tensor:
    """Removes a weight from the source and returns it.

    Raises:
        ArtifactError: It is missing.
    """
    shape(source, key)
    return source.weights.pop(key)


def square(source: Source, positions: int) -> int:
    """The side of a square map with this number of positions.

    Raises:
        ArtifactError: The map is not square.
    """
    side = math.isqrt(max(positions, 0))
    if not side or side * side != positions:
        raise ArtifactError(f"the map of codes in {source.path} is not square, which is not supported", found=positions)
    return side
