"""`vqdeploy verify`: every stage of a plan, and whole generations, against PyTorch on the CPU in fp32.

Numbers may differ by rounding, decisions only where they are close: a code may differ from the reference's only when
the two are nearly as good. Later decisions are judged given the plan's own earlier ones, so that one close call does
not excuse what follows.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdeploy import checkpoint as checkpoints
from vqdeploy.export.layers import ImageInput, ImageOutput
from vqdeploy.models import System
from vqdeploy.models.ops import truncate
from vqdeploy.runtime import Pipeline, load
from vqdeploy.runtime.noise import gumbel

_IMAGES = 4
_SEED = 1
_GREY_LEVELS = 1  # fp32: rounding may move a pixel to the next level
_LOGITS = 1e-4  # of the largest logit
_DISTANCE = 1e-4  # of the largest distance
_MASS = 1e-5  # by how much summing 16,384 probabilities in another order may move a prefix sum
_FORCE = 1e9  # noise that makes the sampler choose a given code


@dataclass(frozen=True)
class Check:
    """One measured value and its limit."""

    stage: str
    metric: str
    value: float
    limit: float
    passed: bool


def at_most(stage: str, metric: str, value: float, limit: float) -> Check:
    """A check that passes when the value does not exceed the limit."""
    return Check(stage, metric, float(value), float(limit), bool(value <= limit))


def verify(
    plan: Path, system: System | None = None, progress: Callable[[str], Any] = lambda name: None
) -> dict[str, Any]:
    """Runs every check of a plan.

    Args:
        plan: The plan.
        system: The checkpoint that it was made of; the shipped one of its preset when None.
        progress: Told the name of each part as its checks begin.

    Returns:
        `{"passed": bool, "checks": [{"stage", "metric", "value", "limit", "passed"}]}`.

    Raises:
        VqdeployError: The plan was made of another checkpoint, or cannot run here.
        ArtifactError: The plan is damaged.
    """
    pipeline = load(plan)
    manifest = pipeline.manifest
    if system is None:
        system = checkpoints.source(manifest.config, manifest.checkpoint, None, plan)
    else:
        checkpoints.check_digest(system, manifest.checkpoint, plan)
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
    rng = np.random.default_rng(0)
    progress("encode and decode")
    checks = check_tokenizer(pipeline, system, rng)
    if system.prior is not None:
        progress("step")
        logits = check_logits(pipeline, system, rng)
        progress("generation")
        checks += logits + check_generation(pipeline, system, tolerance=2 * min(logits[0].value, logits[0].limit))
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}


def check_tokenizer(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """`encode` by the margin rule for codes, `decode` from the same codes."""
    tokenizer, shape = system.tokenizer, (_IMAGES, *pipeline.grid)
    drawn = rng.integers(0, pipeline.codebook_size, shape)
    drawn[-1, ..., 1:] = -1  # coarse only
    output = ImageOutput(tokenizer.config.pixel_range)
    expected = output(tokenizer.decode(torch.from_numpy(drawn))).numpy()
    decoded = pipeline.decode(np.maximum(drawn, 0))[:-1], pipeline.decode(np.maximum(drawn[-1:], 0), depth=1)
    levels = np.abs(np.concatenate(decoded).astype(int) - expected).max()

    images = np.concatenate([expected, _smooth_images(pipeline.side, rng)])
    codes = torch.from_numpy(pipeline.encode(images))
    latents = tokenizer.latents(ImageInput(tokenizer.config.pixel_range)(torch.from_numpy(images)))
    agreement = (codes == tokenizer.quantizer.encode(latents)[0]).float().mean()
    return [
        at_most("encode", "share of codes that differ", 1 - agreement, 0.01),
        at_most("encode", "codes outside the margin rule", _far_codes(tokenizer, latents, codes), 0),
        at_most("decode", "largest difference in grey levels", levels, _GREY_LEVELS),
    ]


def _smooth_images(side: int, rng: np.random.Generator) -> np.ndarray:
    coarse = torch.from_numpy(rng.random((_IMAGES, 3, 8, 8), dtype=np.float32))
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _far_codes(tokenizer: Any, latents: Tensor, codes: Tensor) -> int:
    """How many codes are farther from their residual than the nearest one is, given the codes before them."""
    residual, far = latents.flatten(0, -2), 0
    for code in codes.flatten(0, -2).unbind(-1):
        distances = torch.cdist(residual, tokenizer.quantizer.codebook).square()
        gap = distances.gather(1, code[:, None])[:, 0] - distances.amin(1)
        far += int((gap > _DISTANCE * distances.max()).sum())
        residual = residual - tokenizer.quantizer.codebook[code]
    return far


def check_logits(pipeline: Pipeline, system: System, rng: np.random.Generator) -> list[Check]:
    """Teacher-forced logits of the cached step, position by position and after a prefix, against the full forward."""
    batch, config = 2, system.prior.config
    codes = rng.integers(0, config.codebook_size, (batch, config.positions, config.depth))
    labels = rng.integers(0, config.classes, batch)
    reference = system.prior.logits(torch.from_numpy(codes).view(batch, *config.grid), torch.from_numpy(labels))
    reference = reference.view(batch, config.positions, config.depth, -1)
    limit = _LOGITS * reference.abs().max()
    checks = []
    for name, prefix in (("cached step", 0), ("prefix", config.positions // 2)):
        logits = torch.from_numpy(_forced_logits(pipeline, codes, labels, prefix))
        expected = reference[:, prefix:]
        difference = (logits - expected).abs()
        largest, mean = difference.max(), difference.mean()
        differing = (logits.argmax(-1) != expected.argmax(-1)).float().mean()
        checks += [
            at_most("step", f"{name}: largest difference of logits", largest, limit),
            at_most("step", f"{name}: mean difference of logits", mean, limit / 10),
            at_most("step", f"{name}: share of likeliest codes that differ", differing, 0.01),
        ]
    return checks


def _forced_logits(pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray, prefix: int) -> np.ndarray:
    """Logits [B, h * w - prefix, Q, K] while noise forces the sampler to the given codes."""
    session, (batch, positions, depth) = pipeline.session("step"), codes.shape
    caches = session.caches({"batch": batch, "length": 1})
    binding = session.bind({"batch": batch, "length": 1}, caches)
    options = {"label": labels, "temperature": 1, "top_k": pipeline.codebook_size, "top_p": 1}
    if prefix:
        first = session.bind({"batch": batch, "length": prefix}, caches)
        _write(first.inputs, position=0, codes=np.pad(codes[:, : prefix - 1], ((0, 0), (1, 0), (0, 0))), **options)
        first.run()
    rows, collected = np.indices((batch, depth)), []
    for position in range(prefix, positions):
        _write(binding.inputs, position=position, codes=codes[:, [max(position - 1, 0)]], noise=0, **options)
        binding.inputs["noise"][rows[0], rows[1], codes[:, position]] = _FORCE
        binding.run()
        collected.append(binding.outputs["logits"].copy())
    return np.stack(collected, 1)


def _write(buffers: dict[str, np.ndarray], **values: Any) -> None:
    for name, value in values.items():
        buffers[name][:] = value.reshape(-1, *[1] * (buffers[name].ndim - 1)) if name == "label" else value


def check_generation(pipeline: Pipeline, system: System, tolerance: float) -> list[Check]:
    """Whole generations by the margin rule for tokens; an image alone against the same image in a batch."""
    labels = [i % pipeline.classes for i in range(_IMAGES)]
    checks = []
    distributions: dict[str, dict[str, Any]] = {
        "whole distribution": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "truncated": {"temperature": 0.8, "top_k": pipeline.codebook_size // 4, "top_p": 0.9},
    }
    for name, options in distributions.items():
        codes = pipeline.generate(labels, seed=_SEED, **options).codes
        far, _ = _judge(system, codes, labels, 0, options, tolerance)
        checks.append(at_most("generate", f"{name}: tokens outside the margin rule", far.sum(), 0))
    again = pipeline.generate(labels, seed=_SEED, **options).codes
    checks.append(at_most("generate", "codes that differ in a second run", (again != codes).sum(), 0))

    chosen = _IMAGES - 2
    label = [labels[chosen]]
    alone = pipeline.generate(label, seed=_SEED, first_image=chosen, **options).codes
    far, close = _judge(system, alone, label, chosen, options, tolerance)
    different = np.flatnonzero((alone != codes[chosen : chosen + 1]).ravel())
    excused = different.size == 0 or close.ravel()[different[0]]
    checks.append(at_most("generate", "image alone: tokens outside the margin rule", far.sum() + (not excused), 0))
    return checks


def _judge(
    system: System, codes: np.ndarray, labels: list[int], first: int, options: dict[str, Any], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Holds generated codes against the reference's choice, given the codes before each.

    Returns:
        Which codes the reference would clearly not have drawn, and where its two best candidates are closer than the
        tolerance; both bool, of the shape of the codes.
    """
    slack = tolerance / options["temperature"] + 1e-6
    logits = system.prior.logits(torch.from_numpy(codes), torch.tensor(labels)).flatten(0, -2)
    surely, perhaps = _candidates(logits, options, slack)
    perturbed = logits / options["temperature"] + _noise(codes.shape, first, logits.shape[1])
    drawn = torch.from_numpy(codes).view(-1, 1)
    best = perturbed.masked_fill(~surely, -torch.inf).amax(1)
    far = (perturbed.gather(1, drawn)[:, 0] < best - slack) | ~perhaps.gather(1, drawn)[:, 0]
    two = perturbed.masked_fill(~perhaps, -torch.inf).topk(2).values
    close = two[:, 0] - two[:, 1] <= slack
    return far.view(codes.shape).numpy(), close.view(codes.shape).numpy()


def _candidates(logits: Tensor, options: dict[str, Any], slack: float) -> tuple[Tensor, Tensor]:
    """Which codes [N, K] truncation surely, and which it perhaps leaves in, when logits are off by up to `slack`."""
    rows, size = logits.shape
    temperature, top_p = options["temperature"], options["top_p"]
    top_k = torch.full((rows,), options["top_k"] or size)

    def lowest_kept(p: float) -> Tensor:
        kept = truncate(logits, torch.full((rows,), temperature), top_k, torch.full((rows,), p))
        return kept.masked_fill(kept < -1e29, torch.inf).amin(1, keepdim=True)

    if top_p >= 1 and options["top_k"] == 0:
        everything = torch.ones_like(logits, dtype=torch.bool)
        return everything, everything
    scaled = logits / temperature
    surely = scaled >= lowest_kept(max(top_p - _MASS, 0.0)) + slack
    surely |= scaled >= scaled.amax(1, keepdim=True)
    return surely, scaled >= lowest_kept(min(top_p + _MASS, 1.0)) - slack


def _noise(shape: tuple[int, ...], first: int, size: int) -> Tensor:
    """The noise behind codes of this shape [B * h * w * Q, K]."""
    batch, height, width, depth = shape
    noise = np.empty((height * width, batch, depth, size), np.float32)
    for position in range(height * width):
        gumbel(_SEED, np.arange(first, first + batch), position, noise[position])
    return torch.from_numpy(noise).transpose(0, 1).reshape(-1, size)


def table(report: dict[str, Any]) -> str:
    """The report as text, one check a line."""
    lines = [
        f"{'ok  ' if c['passed'] else 'FAIL'} {c['stage']:9} {c['metric']:58} {c['value']:<9.3g} limit {c['limit']:.4g}"
        for c in report["checks"]
    ]
    return "\n".join([*lines, "PASSED" if report["passed"] else "FAILED"])
