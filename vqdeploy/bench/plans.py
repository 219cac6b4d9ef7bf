"""How plans of one system differ, speed aside: size, start, memory, distributions of codes."""

import logging
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.bundle import tensors
from vqdeploy.runtime.forcing import forced_logits, images_to_compare, masked_logits, partly_masked, scale_logits
from vqdeploy.runtime.manifest import WEIGHTS

log = logging.getLogger("vqdeploy")

_ONE_IMAGE = """
import sys
from pathlib import Path
import vqdeploy
from vqdeploy.machine import peak_memory_mb
from vqdeploy.runtime.images import write_grid
plan, picture, device, threads = sys.argv[1:]
pipeline = vqdeploy.load(plan, device, int(threads), keep=False)
write_grid(Path(picture), pipeline.generate(pipeline.condition.examples(1)).images, 1, {})
print(peak_memory_mb() or "nan")
"""


def describe(pipeline: Pipeline, threads: int) -> dict[str, float]:
    """Size of a plan, and start and memory of a process that generates one image with it; see `bench`."""
    with tempfile.TemporaryDirectory() as folder:
        plan, picture = str(pipeline.bundle.path), str(Path(folder) / "image.png")
        command = [sys.executable, "-P", "-c", _ONE_IMAGE, plan, picture, pipeline.device, str(threads)]
        start = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
        seconds = time.perf_counter() - start
        if ended.returncode:
            log.warning("the first image of %s was not timed: its process ended with %d", plan, ended.returncode)
    return {
        "plan_mb": pipeline.bundle.path.stat().st_size / 2**20,
        "needed_mb": _needed_bytes(pipeline) / 2**20,
    } | ({} if ended.returncode else {"peak_mb": float(ended.stdout), "first_image_s": seconds})


def _needed_bytes(pipeline: Pipeline) -> int:
    """Bytes of the stages that generate images, with their weights."""
    stages = [stage for stage in pipeline.manifest.stages if stage.name not in ("encode", "features")]
    names, sizes = {name for stage in stages for name in stage.weights}, pipeline.bundle.sizes()
    weights = tensors(pipeline.bundle.member(WEIGHTS)) if names else {}
    return sum(weights[name].nbytes for name in names) + sum(sizes[stage.file] for stage in stages)


def divergences(pipeline: Pipeline, others: dict[str, Pipeline], **options: Any) -> dict[str, dict[str, float]]:
    """How far the distributions of codes of other plans are from those of the first, at codes that it draws.

    Args:
        pipeline: The first plan.
        others: Other plans of its checkpoint, by name.
        **options: Sampling options to draw with. The distributions are those without guidance and truncation.

    Returns:
        For each name `divergence`, the mean Kullback-Leibler divergence in nats, and `variation`, the mean total
        variation distance (0..1).
    """
    if not others:
        return {}
    labels = pipeline.condition.examples(images_to_compare(math.prod(pipeline.grid)))
    unknown = np.full((len(labels), *pipeline.grid), -1)
    codes = pipeline.sample(unknown, labels, seed=1, chosen=pipeline.options(**options))[0]
    reference = _log_probabilities(pipeline, codes, labels)
    found = {}
    for name, other in others.items():
        compared = _log_probabilities(other, codes, labels)
        probability = np.exp(reference)
        found[name] = {
            "divergence": float((probability * (reference - compared)).sum(-1).mean()),
            "variation": float(np.abs(probability - np.exp(compared)).sum(-1).mean() / 2),
        }
    return found


def _log_probabilities(pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log probabilities float64 [..., K] of each code: given those before it, or those that are not masked."""
    if pipeline.sampling.kind == "masked":
        masked = partly_masked(codes, pipeline.codebook_size, np.random.default_rng(0))
        logits = masked_logits(pipeline, masked, labels)
    elif pipeline.sampling.kind == "next-scale":
        logits = scale_logits(pipeline, codes, labels)
    else:
        depth = codes.shape[-1] if codes.ndim > 2 else 1
        logits = forced_logits(pipeline, codes.reshape(len(codes), -1, depth), np.full_like(codes, -1), labels)
    shifted: np.ndarray = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
