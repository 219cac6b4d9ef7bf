"""Brings the module of a stage to a precision; see `vqdeploy.precision`."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export.convolutions import has_convolutions, quantize_convolutions
from vqdeploy.export.layers import CachedAttention, Product, Projection, RowProduct
from vqdeploy.export.quantizers import Replacement
from vqdeploy.export.rounding import BLOCK, rounded, rounded_columns
from vqdeploy.export.stage import Stage
from vqdeploy.models.quantizers import AveragedCodebook
from vqdeploy.precision import PRECISIONS

KEPT = (AveragedCodebook, Replacement)
"""Modules that compute in fp32 in every precision, with all their submodules."""

_LARGEST_OF_CACHES = 127

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""`Precision.floats` -> type."""


def in_precision(stage: Stage, precision: str) -> Stage:
    """Converts weights and states of a stage to a precision, one of `PRECISIONS`; codebooks stay in fp32.

    A stage whose products all need 8 bits is in int8 when int4 is asked for.

    Each layer casts its inputs to the type of its weights, so that models need no code for precisions.

    Raises:
        VqdeployError: A weight overflows the precision, or the stage has nothing that the precision is for.
    """
    chosen = PRECISIONS[precision]
    if chosen.bits:
        if stage.in_products:
            stage = stage.in_products()
        module = _copied(stage.module)
        calibration = stage.calibration if chosen.bits == 8 and has_convolutions(module) else None
        if calibration is None and not has_products(stage):
            raise VqdeployError(
                f"stage {stage.name} has nothing to store in {precision}",
                expected="products" if chosen.bits < 8 else "products or a decoder",
                fix=f"leave out {stage.name}={precision}",
            )
        if calibration is not None:
            quantize_convolutions(module, calibration())
        _quantize(module, chosen.bits)
        in_blocks = any(isinstance(part, BlockQuantizedProduct) for part in module.modules())
        return dataclasses.replace(stage, module=module, precision=precision if in_blocks else "int8")
    dtype = DTYPES[chosen.floats]
    if dtype == torch.float32:
        return dataclasses.replace(stage, precision=precision)
    module = copy.deepcopy(stage.module)
    kept = _kept(module)
    for part in module.modules():
        if part not in kept:
            for weight in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                weight.data = _fitting(weight.data, dtype)
        if isinstance(getattr(part, "weight", None), Tensor):  # norms may go without
            part.register_forward_pre_hook(_in_type_of_weight)
    inputs = {name: _state(x, dtype) if name in stage.states else x for name, x in stage.inputs.items()}
    return dataclasses.replace(stage, module=module, inputs=inputs, precision=precision)


def _copied(module: nn.Module) -> nn.Module:
    """A copy whose modules may be replaced. It shares weights and what was observed, which may fill the memory."""
    observed = [part.moment for part in module.modules() if isinstance(getattr(part, "moment", None), Tensor)]
    return copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers(), *observed)})


def has_products(stage: Stage) -> bool:
    """Whether a stage has matrix products to quantize."""
    return stage.in_products is not None or any(_quantizable(stage.module))


def _quantizable(module: nn.Module) -> Iterator[tuple[nn.Module, str, Product | nn.Linear]]:
    """The products and linear layers within a module that may be quantized, each with its owner and name there."""
    kept = _kept(module)
    for owner in list(module.modules()):
        for name, part in list(owner.named_children()):
            if (isinstance(part, Product) and part.least_bits <= 8) or (
                isinstance(part, nn.Linear) and part not in kept
            ):
                yield owner, name, part


def _kept(module: nn.Module) -> set[nn.Module]:
    return {part for owner in module.modules() if isinstance(owner, KEPT) for part in owner.modules()}


class QuantizedProduct(nn.Module):
    """`Product` with weights in int8, scaled by column."""

    weight: Tensor  # int8 [inputs, outputs]
    scale: Tensor  # [outputs]

    def __init__(self, product: Product):
        super().__init__()
        integers, scale = rounded_columns(product.weight, moment=product.moment)
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.vqdeploy.quantized_product(x, self.weight, self.scale)
        return product


class QuantizedRowProduct(QuantizedProduct):
    """`RowProduct` with weights in int8, scaled by column."""

    def __init__(self, product: RowProduct):
        super().__init__(product)
        self.taps = product.taps

    def forward(self, x: Tensor) -> Tensor:
        row: Tensor = torch.ops.vqdeploy.quantized_row_convolution(x, self.weight, self.scale, self.taps)
        return row


class BlockQuantizedProduct(nn.Module):
    """`Product` with weights in 4 bits, scaled by blocks of inputs."""

    weight: Tensor  # uint8 [outputs, blocks, BLOCK / 2], see `block_quantized_product`
    scale: Tensor  # [outputs, blocks]

    def __init__(self, product: Product):
        super().__init__()
        integers, scale = rounded(product.weight, product.moment)
        first, second = (integers.T + 8).to(torch.uint8).unflatten(1, (-1, BLOCK // 2, 2)).unbind(-1)
        self.register_buffer("weight", first | second << 4)
        self.register_buffer("scale", scale.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.vqdeploy.block_quantized_product(x, self.weight, self.scale)
        return product


class QuantizedCachedAttention(nn.Module):
    """`CachedAttention` with caches in int8, scaled by head."""

    key_scale: Tensor  # [1, H, 1, D]
    value_scale: Tensor  # [1, H, 1, D]

    def __init__(self, attention: CachedAttention, width: int):
        super().__init__()
        largest = cast(Tensor, attention.largest)
        if not largest.isfinite().all():
            raise VqdeployError("keys and values are too large to store in int8", fix="leave out caches=int8")
        scales = torch.where(largest > 0, largest / _LARGEST_OF_CACHES, 1.0)[:, None, :, None, None]
        key, value = scales.repeat(1, 1, 1, 1, width)
        self.register_buffer("key_scale", key)
        self.register_buffer("value_scale", value)

    def forward(self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.vqdeploy.quantized_cached_attention(
            qkv, key, value, position, self.key_scale, self.value_scale
        )
        return result


def with_int8_caches(stage: Stage) -> Stage:
    """Stores the KV caches of a stage, made while its prior was `observed`, in int8.

    Raises:
        VqdeployError: Keys or values are not finite.
    """
    module, caches = _copied(stage.module), ("past_key", "past_value")
    width = stage.inputs["past_key"][0].shape[-1]
    for owner in list(module.modules()):
        for name, part in list(owner.named_children()):
            if isinstance(part, CachedAttention):
                owner.register_module(name, QuantizedCachedAttention(part, width))
    inputs = {name: [each.to(torch.int8) for each in x] if name in caches else x for name, x in stage.inputs.items()}
    return dataclasses.replace(stage, module=module, inputs=inputs)


def _quantize(module: nn.Module, bits: int) -> None:
    """Quantizes the matrix products within a module to this many bits, or 8 where they need more."""
    for owner, name, part in _quantizable(module):
        if isinstance(part, Product):
            owner.register_module(name, _quantized(part, bits))
        else:
            projection = Projection(part)
            projection.register_module("product", _quantized(projection.product, bits))
            owner.register_module(name, projection)


def _quantized(product: Product, bits: int) -> nn.Module:
    if isinstance(product, RowProduct):
        return QuantizedRowProduct(product)  # of many rows, which are slower in 4 bits
    if max(bits, product.least_bits) == 8 or len(product.weight) % BLOCK:
        return QuantizedProduct(product)
    return BlockQuantizedProduct(product)


def _fitting(weight: Tensor, dtype: torch.dtype) -> Tensor:
    fitted = _cast(weight, dtype)
    if fitted.is_floating_point() and (fitted.isinf() & weight.isfinite()).any():
        largest = torch.finfo(dtype).max
        found = f"{float(weight.abs().max()):.4g}"
        raise VqdeployError(
            "a weight does not fit fp16", expected=f"at most {largest:.4g}", found=found, fix="--dtype fp32"
        )
    return fitted


def _in_type_of_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = cast(Tensor, layer.weight)
    return tuple(_state(x, weight.dtype) if isinstance(x, Tensor | list) else x for x in inputs)


def _state(x: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    return [_cast(each, dtype) for each in x] if isinstance(x, list) else _cast(x, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
