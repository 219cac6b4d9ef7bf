"""From weights under public names to a part of ours: each of our names asks for one, and nothing may be left over."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vqdeploy.convert.containers import Source, Weights
from vqdeploy.errors import ArtifactError, VqdeployError

_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class Part:
    """A tokenizer or a prior of ours.

    Attributes:
        model: The system that it belongs to.
        config: Its configuration.
        weights: Its state_dict.
        notes: What to tell the user.
        sampling: Options that its publishers sampled with.
    """

    model: str
    config: Any
    weights: Weights
    notes: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def fit(
    source: Source,
    make: Callable[[], nn.Module],
    public: Callable[[str], str],
    given: Mapping[str, Tensor] | None = None,
    ignored: str = "(?!)",
) -> Weights:
    """The state_dict of a model, each weight taken from the public name of ours.

    Trailing dimensions of 1 may differ: a linear layer is a convolution of one tap.

    Args:
        source: The weights.
        make: Makes the model; it is made without memory.
        public: The public name of one of our names.
        given: Weights of the model that are not taken from the file by name, by our names.
        ignored: Pattern of public names that nothing asks for, and that are known to be no weights of the model.

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
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(over)}, which nothing asks for"] * bool(
            over
        )
        raise ArtifactError(f"{source.path} {' and '.join(parts)}")
    return {name: weights[name] for name in expected}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shaped(source: Source, key: str, weight: Tensor, meta: Tensor) -> Tensor:
    if weight.layout != torch.strided or weight.is_quantized:
        raise ArtifactError(f"{key} in {source.path} is no plain tensor")
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
    """The weights behind a prefix, and what the configuration says under a key."""
    weights = {key.removeprefix(prefix): w for key, w in source.weights.items() if key.startswith(prefix)}
    inner = next((value for key, value in _entries(source.config) if key == config), source.config)
    return replace(source, weights=weights, config=inner)


def section(config: Any, *keys: str) -> dict[str, Any]:
    """The first section of a configuration that has all of these keys; empty when there is none."""
    if isinstance(config, dict) and set(keys) <= set(config):
        return config
    return next((value for _, value in _entries(config) if isinstance(value, dict) and set(keys) <= set(value)), {})


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """All entries of a configuration, whatever section they are in."""
    seen, left = set(), [config]
    while left:
        node = left.pop(0)
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            yield from node.items()
        left += node.values() if isinstance(node, dict) else node


def whole(values: Mapping[str, Any], key: str) -> int | None:
    """A whole number of a configuration, which may be text; None when it is not there."""
    value = values.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ArtifactError(f"{key} of the configuration is malformed", expected="a whole number", found=repr(value))
    return int(number)


def need(value: int | None, key: str, source: Source, option: str) -> int:
    """A number that the weights do not tell.

    Raises:
        VqdeployError: The configuration does not tell it either.
    """
    if value is None:
        raise VqdeployError(
            f"{key} cannot be read off the weights in {source.path}", fix=f"add {option} FILE, a YAML that gives {key}"
        )
    return value


def check(source: Source, declared: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuses a configuration that is of other weights.

    Args:
        source: The weights.
        declared: Values by the names of the public configuration, None where it is silent.
        found: The same, read off the weights.
    """
    for key, value in declared.items():
        if value is not None and value != found[key]:
            raise ArtifactError(
                f"the configuration is not that of {source.path}: {key} differs", expected=found[key], found=value
            )


def count(source: Source, name: Callable[[int], str]) -> int:
    """How many of the numbered names there are, from 0 on."""
    number = 0
    while name(number) in source.weights:
        number += 1
    return number


def learned(codebook: Tensor) -> Weights:
    """The buffers of an `AveragedCodebook` for a codebook that was learned otherwise, by our names."""
    ones = torch.ones(len(codebook))
    return {
        "quantizer.codebook": codebook,
        "quantizer.embed_ema": codebook,
        "quantizer.cluster_size_ema": ones,
    }


def shape(source: Source, key: str) -> list[int]:
    """The shape of a weight.

    Raises:
        ArtifactError: It is not there.
    """
    if key not in source.weights:
        raise ArtifactError(f"{source.path} lacks {key}")
    return list(source.weights[key].shape)


def take(source: Source, key: str) -> Tensor:
    """A weight, which leaves the source.

    Raises:
        ArtifactError: It is not there.
    """
    shape(source, key)
    return source.weights.pop(key)


def square(source: Source, positions: int) -> int:
    """The side of a square map of so many positions.

    Raises:
        ArtifactError: The map is not square.
    """
    side = math.isqrt(max(positions, 0))
    if not side or side * side != positions:
        raise ArtifactError(f"the map of codes in {source.path} is not square, which is not supported", found=positions)
    return side
