"""The precision of a graph: that of its weights and of the states that pass from call to call.

Images, codes and what a request gives, noise included, keep their types in every precision. So does whatever decides:
the search of the codebooks and the sampling are fp32.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from vqdeploy.errors import VqdeployError
from vqdeploy.export.quantizers import Replacement
from vqdeploy.export.stage import Stage
from vqdeploy.models.quantizers import AveragedCodebook

KEPT = (AveragedCodebook, Replacement)
"""Modules that compute in fp32 in every precision, with all that is in them."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Name of a precision -> type of the weights."""


def in_precision(stage: Stage, precision: str) -> Stage:
    """A stage with weights and states of a precision, one of `DTYPES`; codebooks stay in fp32.

    Each layer takes its inputs in the type of its weights, so that no model has to know of precisions.

    Raises:
        VqdeployError: A weight is too large for the precision.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return stage
    module = copy.deepcopy(stage.module)  # the layers of a stage are those of the system
    kept = {part for owner in module.modules() if isinstance(owner, KEPT) for part in owner.modules()}
    for part in module.modules():
        if part not in kept:
            for weight in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                weight.data = _fitting(weight.data, dtype)
        if isinstance(getattr(part, "weight", None), Tensor):  # norms may go without
            part.register_forward_pre_hook(_in_type_of_weight)
    inputs = {name: _cast(x, dtype) if name in stage.states else x for name, x in stage.inputs.items()}
    return dataclasses.replace(stage, module=module, inputs=inputs)


def _fitting(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast: Tensor = _cast(weight, dtype)
    if cast.is_floating_point() and (cast.isinf() & weight.isfinite()).any():
        largest = torch.finfo(dtype).max
        found = f"{float(weight.abs().max()):.4g}"
        raise VqdeployError(
            "a weight does not fit fp16", expected=f"at most {largest:.4g}", found=found, fix="--dtype fp32"
        )
    return cast


def _in_type_of_weight(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(x, layer.weight.dtype) for x in inputs)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, list):
        return [_cast(each, dtype) for each in x]
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
