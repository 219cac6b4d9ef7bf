"""Resolves sampling options: defaults, validation, and conversion to graph inputs."""

from typing import Any

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.options import OPTIONS, SamplingOption, check_names
from vqdeploy.runtime.arguments import as_numbers

_COLDEST, _HOTTEST = 1e-20, 1e20  # range of temperatures for which logits / temperature fits fp32


def choose(given: dict[str, Any], defaults: dict[str, Any], depth: int, codebook_size: int) -> dict[str, Any]:
    """The effective options: numbers, names, or lists with one number per depth.

    Args:
        given: Options of a request; None means the default.
        defaults: All options of the system, with the defaults of the checkpoint.
        depth: Codes per position.
        codebook_size: Number of codes.

    Raises:
        VqdeployError: A value is malformed or out of range, or the system has no such option.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(given) - set(defaults)):
        raise VqdeployError(f"this system has no option {unknown[0]}", expected=", ".join(defaults), found=unknown[0])
    check_names(set(defaults))
    chosen = defaults | given
    return {name: _check(OPTIONS[name], value, depth, codebook_size) for name, value in chosen.items()}


def _check(option: SamplingOption, value: object, depth: int, codebook_size: int) -> object:
    if option.choices:
        option.check(value, codebook_size)
        return value
    as_numbers(option.name, value)
    values, most = np.asarray(value), depth if option.per_depth else 1
    if np.atleast_1d(values).shape not in ((1,), (most,)):
        expected = f"one value or {most}" if most > 1 else "one value"
        raise VqdeployError(f"{option.name} has the wrong number of values", expected=expected, found=values.size)
    for each in values.ravel().tolist():
        option.check(each, codebook_size)
    return values.tolist() if option.per_depth else option.type(values.item())


def for_graph(chosen: dict[str, Any], depth: int, codebook_size: int) -> dict[str, np.ndarray]:
    """Options as graph inputs [Q]: `temperature` float32 above 0, `top_k` int64 in 1..K, `top_p` float32."""
    temperature = np.broadcast_to(np.clip(np.asarray(chosen["temperature"], float), 0, _HOTTEST), depth)
    top_k = np.broadcast_to(np.asarray(chosen["top_k"], np.int64), depth)
    greedy = temperature < _COLDEST
    return {
        "temperature": np.where(greedy, 1, temperature).astype(np.float32),
        "top_k": np.where(greedy, 1, np.where(top_k == 0, codebook_size, top_k)),
        "top_p": np.broadcast_to(np.asarray(chosen["top_p"], np.float32), depth),
    }
