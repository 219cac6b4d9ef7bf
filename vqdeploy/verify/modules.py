"""Checks of a plan from `export_module`, stage by stage, against the original module with its own quantizers.

Every stage runs at several sizes, on variations of its examples. Floats may differ by rounding; codes only within a
margin, judged by the input vectors of the quantizer of the module, given the earlier codes of the plan. To find which
output comes from which quantizer, the quantizers of the module are made to return unique numbers instead of codes.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export.modules import BATCH, Call, Stage, at_border, resized, weights_digest
from vqdeploy.export.quantizers import Replacement, copied, quantizers, replacements
from vqdeploy.precision import Limits
from vqdeploy.runtime import Pipeline, load
from vqdeploy.runtime.manifest import SizeRange, StageInfo, TensorInfo
from vqdeploy.verify.checks import Check, at_most, limits

_Index = EllipsisType | tuple[slice | Tensor, ...]
_Result = Tensor | tuple[Tensor, ...]


def verify(
    plan: Path,
    model: nn.Module,
    stages: Mapping[str, Stage],
    progress: Callable[[str], object] = lambda name: None,
    device: str = "auto",
) -> dict[str, Any]:
    """Runs all checks of a plan that was made with `vqdeploy.export.export_module`.

    Args:
        plan: The plan.
        model: The module.
        stages: The exported stages.
        progress: Called with the name of each stage before its checks.
        device: Where the plan runs, as for `vqdeploy.runtime.load`; PyTorch runs on the CPU.

    Returns:
        A report as of `vqdeploy.verify.verify`.

    Raises:
        VqdeployError: The plan cannot run here, or the module itself fails at a size that the plan accepts.
        ArtifactError: The plan is damaged, or has no such stage.
    """
    with load(plan, device) as pipeline:
        reference = copied(model)
        if weights_digest(reference) != pipeline.manifest.provenance.checkpoint:
            raise VqdeployError(f"{plan} was made from other weights", fix="export the module again")
        served = replacements(reference)
        checks: list[Check] = []
        for name, stage in stages.items():
            progress(f"verifying {name}")
            checks += _check_stage(pipeline, Call(name, reference, stage), stage, served)
        return {
            "passed": all(check.passed for check in checks),
            "checks": [asdict(check) for check in checks],
            "precision": pipeline.manifest.precision,
            "device": pipeline.device,
        }


def verify_package(
    folder: Path,
    model: nn.Module,
    stages: Mapping[str, Stage],
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Runs every check on the graphs of an ONNX package as they are, with their portable function bodies."""
    from vqdeploy.engines.build import build

    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch) / "package.plan"
        build(folder, plan, portable=True)
        return verify(plan, model, stages, progress)


@dataclass
class _Worst:
    """The worst deviations of an output over all runs."""

    difference: float = 0.0
    largest: float = 0.0
    differing: float = 0.0  # share of integers that differ
    far: int = 0  # codes

    def add(self, **values: float) -> None:
        for name, value in values.items():
            # NaN is worse than every number.
            setattr(self, name, math.inf if math.isnan(value) else max(getattr(self, name), value))


@torch.no_grad()
def _check_stage(pipeline: Pipeline, call: Call, stage: Stage, served: dict[str, nn.Module]) -> list[Check]:
    info, allowed = pipeline.manifest.stage(call.name), limits(pipeline.manifest, call.name)
    axes = {tensor.name: {i: d for i, d in enumerate(tensor.shape) if isinstance(d, str)} for tensor in info.inputs}
    noise = torch.Generator().manual_seed(0)
    worst = {output.name: _Worst() for output in info.outputs}
    for sizes in _cases(info, {dim for own in axes.values() for dim in own.values()}):
        inputs = resized(stage.inputs, axes, sizes, noise)
        found = pipeline.run(call.name, **{name: at_border(x).numpy() for name, x in inputs.items()})
        try:
            _compare(call, info, list(inputs.values()), found, served, allowed, worst)
        except VqdeployError:
            raise
        except Exception as error:  # modules raise anything
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            fix = "give export_module the sizes that the module accepts"
            raise VqdeployError(f"the module itself fails at {shown} ({reason})", fix=fix) from error
    return [check for output in info.outputs for check in _checks(call.name, output, worst[output.name], allowed)]


def _checks(stage: str, output: TensorInfo, worst: _Worst, allowed: Limits) -> Iterator[Check]:
    if output.dtype == "float32":
        limit = allowed.logits * max(worst.largest, 1e-6)
        yield at_most(stage, f"{output.name}: largest difference", worst.difference, limit)
    else:
        yield at_most(stage, f"{output.name}: share that differs", worst.differing, allowed.codes)
        yield at_most(stage, f"{output.name}: codes outside the margin rule", worst.far, 0)


def _cases(info: StageInfo, names: set[str]) -> list[dict[str, int]]:
    """Sizes to run a stage at: smallest, usual and larger ones, and batch sizes other than the traced one."""

    def size(dim: SizeRange, name: str, case: int) -> int:
        wanted = (1, 3, 5)[case] if name == BATCH else (dim.min, dim.usual, 2 * dim.usual)[case]
        return min(max(wanted, dim.min), dim.max)

    cases = [{name: size(info.dims[name], name, case) for name in sorted(names)} for case in range(3)]
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def _compare(
    call: Call,
    info: StageInfo,
    inputs: list[Tensor],
    found: dict[str, np.ndarray],
    served: dict[str, nn.Module],
    allowed: Limits,
    worst: dict[str, _Worst],
) -> None:
    """Adds the deviations of one run to `worst`."""
    modules = quantizers(call.model)
    with _watched(modules) as record:
        expected = dict(zip(call.outputs, call(*inputs), strict=True))
    for name, array in found.items():
        if array.shape != tuple(expected[name].shape):
            found_shape, wanted = list(array.shape), list(expected[name].shape)
            raise VqdeployError(f"{name} of stage {call.name} has the wrong shape", expected=wanted, found=found_shape)
    whole = {name: torch.from_numpy(x) for name, x in found.items() if not expected[name].is_floating_point()}
    origin = _origins(call, inputs, modules, record, whole)
    for name, codes in whole.items():
        if codes.numel():
            worst[name].add(differing=float((codes != expected[name]).double().mean()))
        if name in origin:
            worst[name].add(far=_far(record, origin[name], codes, served, allowed.distance))
    differs = {name: codes != expected[name] for name, codes in whole.items()}
    shapes = {output.name: output.shape for output in info.outputs}
    for name, array in found.items():
        if name in whole:
            continue
        same = _rows_alike(shapes, name, differs)
        own, theirs = torch.from_numpy(array)[same], expected[name][same]
        if own.numel():
            largest = theirs.abs().masked_fill(~theirs.isfinite(), 0).max()
            worst[name].add(difference=float(_differences(own, theirs).max()), largest=float(largest))


def _differences(own: Tensor, theirs: Tensor) -> Tensor:
    """Magnitudes of the differences: none between equal infinities or two NaN, which masks leave in both."""
    equal = (own == theirs) | (own.isnan() & theirs.isnan())
    return (own - theirs).abs().masked_fill(equal, 0)


def _rows_alike(shapes: dict[str, tuple[int | str, ...]], name: str, differs: dict[str, Tensor]) -> _Index:
    """Index of the batch items whose codes equal those of the module; floats of others may legitimately differ."""
    if BATCH not in shapes[name]:
        return ...
    alike: Tensor | None = None
    for other, different in differs.items():
        if BATCH in shapes[other]:
            items = ~different.movedim(shapes[other].index(BATCH), 0).flatten(1).any(1)
            alike = items if alike is None else alike & items
    if alike is None:
        return ...
    return (slice(None),) * shapes[name].index(BATCH) + (alike,)


@dataclass
class _Quantized:
    """One call of a quantizer: name, input and codes."""

    name: str
    x: Tensor
    codes: Tensor


def _codes(result: _Result) -> Tensor:
    codes: Tensor = result if isinstance(result, Tensor) else result[1]
    return codes


@contextmanager
def _watched(modules: dict[str, nn.Module]) -> Iterator[list[_Quantized]]:
    """Records the calls of quantizers, in order."""
    record: list[_Quantized] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, result: record.append(_Quantized(name, inputs[0], _codes(result)))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _origins(
    call: Call, inputs: list[Tensor], modules: dict[str, nn.Module], record: list[_Quantized], whole: dict[str, Tensor]
) -> dict[str, Tensor]:
    """For each output that only rearranges codes: the index of each element among all codes of `record`."""
    if not record or not whole:
        return {}
    given = iter(record)
    start = 0

    def number(_module: nn.Module, _inputs: object, result: _Result) -> _Result:
        nonlocal start
        codes = next(given).codes
        places = torch.arange(start, start + codes.numel()).view(codes.shape)
        start += codes.numel()
        return places if isinstance(result, Tensor) else (result[0], places, *result[2:])

    handles = [module.register_forward_hook(number) for module in modules.values()]
    try:
        outputs = dict(zip(call.outputs, call(*inputs), strict=True))
    except Exception:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: outputs[name]
        for name in whole
        if outputs[name].unique().numel() == outputs[name].numel() and _within(outputs[name], start)
    }


def _within(places: Tensor, end: int) -> bool:
    return places.numel() > 0 and int(places.min()) >= 0 and int(places.max()) < end


def _far(record: list[_Quantized], places: Tensor, codes: Tensor, served: dict[str, nn.Module], slack: float) -> int:
    """Number of codes of a plan that are clearly worse than those of the module."""
    every = torch.cat([part.codes.flatten().long() for part in record])
    every[places.flatten()] = codes.flatten()
    far, start = 0, 0
    for part in record:
        own = every[start : start + part.codes.numel()].view(part.codes.shape)
        start += part.codes.numel()
        judge = served[part.name]
        different = own != part.codes
        if isinstance(judge, Replacement):
            far += int(judge.far(part.x, own, slack).sum()) if different.any() else 0
        else:  # a registered class without `far`
            far += int(different.sum())
    return far
