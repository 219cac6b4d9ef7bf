"""PyTorch as the baseline of `vqdeploy bench`: what the public implementations do, eager or compiled."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vqdeploy import checkpoint as checkpoints
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.noise import gumbel


class Reference:
    """The checkpoint behind a plan, with the same tokens, batch and precision."""

    def __init__(self, pipeline: Pipeline, checkpoint: Path | None):
        manifest = pipeline.manifest
        self.system = checkpoints.source(manifest.config, manifest.checkpoint, checkpoint, pipeline.bundle.path)
        self.sampling = manifest.config["sampling"]

    def call(self, task: str, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        """A call that does the task once."""
        run = {"encode": self._encode, "decode": self._decode, "generate": self._generate}[task](
            batch, pipeline, compiled
        )
        return torch.inference_mode()(run)

    def _encode(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        images = torch.rand(batch, 3, pipeline.side, pipeline.side) * 2 - 1
        encode = _compile(self.system.tokenizer.encode, compiled)
        return lambda: encode(images)

    def _decode(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        codes = torch.randint(pipeline.codebook_size, (batch, *pipeline.grid))
        decode = _compile(self.system.tokenizer.decode, compiled)
        return lambda: decode(codes)

    def _generate(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        prior, depth = self.system.prior, pipeline.grid[-1]
        labels = torch.arange(batch) % pipeline.classes
        top_k = self.sampling["top_k"] or pipeline.codebook_size
        options = [
            torch.full((batch, depth), float(self.sampling["temperature"])),
            torch.full((batch, depth), top_k),
            torch.full((batch, depth), float(self.sampling["top_p"])),
        ]
        noise = _Noise(batch, depth, pipeline.codebook_size)
        if compiled:
            # Each layer's cache, empty and filled, is a case of its own.
            torch._dynamo.config.recompile_limit = 256
            prior = copy.copy(prior)
            prior._modules = dict(prior._modules)
            for name in ("body_transformer", "head_transformer"):
                setattr(prior, name, torch.compile(getattr(prior, name), dynamic=True))
        return lambda: prior.generate(labels, noise, *options)


class _Noise:
    """The plan's own noise, drawn when a position asks for it."""

    def __init__(self, batch: int, depth: int, size: int):
        self.images, self.buffer = np.arange(batch), np.empty((batch, depth, size), np.float32)

    def __getitem__(self, position: int) -> torch.Tensor:
        gumbel(0, self.images, position, self.buffer)
        return torch.from_numpy(self.buffer)


def _compile(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function) if compiled else function
