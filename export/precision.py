"""The precision of a graph: the type of its weights and of the states that pass from call to call.

Images, codes and inputs of a request, noise included, have the same types in every precision. Decisions are always in
fp32: the search of the codebooks and the sampling.
"""

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export.quantizers import Replacement
from vqdeploy.export.stage import Stage
from vqdeploy.models.quantizers import AveragedCodebook

KEPT = (AveragedCodebook, Replacement)
"""Modules that compute in fp32 in every precision, with all their submodules."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Name of a precision -> type of the weights."""


def in_precision(stage: Stage, precision: str) -> Stage:
    """Converts weights and states of a stage to a precision, one of `DTYPES`; codebooks stay in fp32.

    Each layer casts its inputs to the type of its weights, so that models need no code for precisions.

    Raises:
        VqdeployError: A weight overflows the precision.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return stage
    module = copy.deepcopy(stage.module)  # the layers belong to the system
    kept = {part for owner in module.modules() if isinstance(owner, KEPT) for part in owner.modules()}
    for part in module.modules():
        if part not in kept:
            for weight in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                weight.data = _fitting(weight.data, dtype)
        if isinstance(getattr(part, "weight", None), Tensor):  # norms may go without
            part.register_forward_pre_hook(_in_type_of_weight)
    inputs = {name: _state(x, dtype) if name in stage.states else x for name, x in stage.inputs.items()}
    return dataclasses.replace(stage, module=module, inputs=inputs)


def _fitting(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = _cast(weight, dtype)
    if cast.is_floating_point() and (cast.isinf() & weight.isfinite()).any():
        largest = torch.finfo(dtype).max
        found = f"{float(weight.abs().max()):.4g}"
        raise VqdeployError(
            "a weight does not fit fp16", expected=f"at most {largest:.4g}", found=found, fix="--dtype fp32"
        )
    return cast


def _in_type_of_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = cast(Tensor, layer.weight)
    return tuple(_state(x, weight.dtype) if isinstance(x, Tensor | list) else x for x in inputs)


def _state(x: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    return [_cast(each, dtype) for each in x] if isinstance(x, list) else _cast(x, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
