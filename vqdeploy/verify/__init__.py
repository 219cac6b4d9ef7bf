"""`vqdeploy verify`: every stage of a plan, and whole generations, against PyTorch on the CPU in fp32.

Numbers may differ by rounding. Codes may differ only within a margin: when both choices are nearly equally good. Each
decision is judged given the earlier codes of the plan, so that one close call does not excuse later errors.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vqdeploy import checkpoint as checkpoints
from vqdeploy.reference import torch_threads
from vqdeploy.runtime import Pipeline, load
from vqdeploy.systems import System
from vqdeploy.verify import autoregressive, hierarchical, masked, next_scale
from vqdeploy.verify.checks import Check, at_most, limits
from vqdeploy.verify.features import check_features
from vqdeploy.verify.tokenizer import check_tokenizer


class PriorChecks(Protocol):
    """The checks of a kind of sampling; `hierarchical` and the others are modules with these functions."""

    def check_logits(self, pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
        """Logits against those of the reference."""

    def check_generation(self, pipeline: Pipeline, system: System, logits: list[Check]) -> list[Check]:
        """Whole generations; `logits` are the checks of `check_logits`."""


PRIORS: dict[str, PriorChecks] = {
    "autoregressive": autoregressive,
    "masked": masked,
    "hierarchical": hierarchical,
    "next-scale": next_scale,
}
"""Kind of sampling in a manifest -> its checks."""


def verify(
    plan: Path,
    system: System | None = None,
    progress: Callable[[str], Any] = lambda name: None,
    device: str = "auto",
    threads: int = 0,
) -> dict[str, Any]:
    """Runs every check of a plan.

    Args:
        plan: The plan.
        system: The checkpoint that it was made from; by default the shipped one of its preset.
        progress: Called with the name of each part before its checks.
        device: Where the plan runs, as for `vqdeploy.runtime.load`; PyTorch runs on the CPU.
        threads: CPU threads of the engine and of PyTorch, as for `vqdeploy.runtime.load`; 0 for one per core.

    Returns:
        `passed`, `precision`, `device`, and `checks`: a list of `stage`, `metric`, `value`, `limit` and `passed`.

    Raises:
        VqdeployError: The plan was made from another checkpoint, or cannot run here.
        ArtifactError: The plan is damaged.
    """
    with load(plan, device, threads) as pipeline, torch_threads(threads):
        origin = pipeline.manifest.provenance
        if system is None:
            system = checkpoints.source(pipeline.manifest.config, origin.checkpoint, None, plan)
        else:
            checkpoints.check_digest(system, origin.checkpoint, plan)
        return _report(pipeline, system, progress)


def verify_package(folder: Path, system: System, progress: Callable[[str], Any] = lambda name: None) -> dict[str, Any]:
    """Runs every check on the graphs of an ONNX package as they are, with their portable function bodies."""
    from vqdeploy.engines.build import build

    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch) / "package.plan"
        build(folder, plan, portable=True)
        return verify(plan, system, progress)


@torch.no_grad()
def _report(pipeline: Pipeline, system: System, progress: Callable[[str], Any]) -> dict[str, Any]:
    # In fp16, some CPU kernels compute in fp32 and hide overflows that a GPU would have. In every precision, the casts
    # to bytes and codes make the same of a NaN on both sides.
    bound = min(limits(pipeline.manifest, stage).largest for stage in pipeline.stages)
    with _largest_number(system.modules()) as largest:
        checks = _checks(pipeline, system, progress)
    limit = min(bound, torch.finfo(torch.float32).max)
    checks.append(at_most("reference", "largest number that leaves a layer", float(largest), limit))
    return {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "precision": pipeline.manifest.precision,
        "device": pipeline.device,
    }


def _checks(pipeline: Pipeline, system: System, progress: Callable[[str], Any]) -> list[Check]:
    rng = np.random.default_rng(0)
    progress("encode and decode")
    checks = check_tokenizer(pipeline, system, rng)
    if system.prior is not None:
        prior = PRIORS[pipeline.sampling.kind]
        progress("step")
        logits = prior.check_logits(pipeline, system, rng)
        checks += logits
        if "features" in pipeline.stages:
            progress("features")
            checks += check_features(pipeline, system, rng)
        progress("generation")
        checks += prior.check_generation(pipeline, system, logits)
    return checks


@contextlib.contextmanager
def _largest_number(layers: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """A scalar that becomes the largest magnitude of the outputs of all layers; NaN if one has a NaN."""
    largest = torch.zeros(())

    def keep(_layer: object, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            largest.copy_(torch.maximum(largest, output.abs().max()))  # `max` of Python loses NaN

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def table(report: dict[str, Any]) -> str:
    """The report as text, one check per line."""
    lines = [
        f"{'ok  ' if c['passed'] else 'FAIL'} {c['stage']:9} {c['metric']:58} {c['value']:<9.3g} limit {c['limit']:.4g}"
        for c in report["checks"]
    ]
    return "\n".join(
        [*lines, f"{'PASSED' if report['passed'] else 'FAILED'} in {report['precision']} on {report['device']}"]
    )
