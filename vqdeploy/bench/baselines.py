"""PyTorch baselines of `vqdeploy bench`: the algorithms of the public implementations, eager or compiled."""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vqdeploy import checkpoint as checkpoints
from vqdeploy.errors import VqdeployError
from vqdeploy.export.precision import DTYPES
from vqdeploy.models.conv import SpatialNorm
from vqdeploy.models.pixelsnail import VQVAE2Prior
from vqdeploy.reference import generate, torch_threads
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.noise import of_images as noise_of

_TIMED_ROWS = 5

P = ParamSpec("P")
T = TypeVar("T")


class Reference:
    """The checkpoint of a plan in PyTorch, with the same codes, batch and precision."""

    def __init__(self, pipeline: Pipeline, checkpoint: Path | None, options: dict[str, Any], threads: int = 0):
        self._threads = threads
        manifest, self.options, self.device = pipeline.manifest, options, pipeline.device
        origin, self._kind = manifest.provenance, manifest.sampling and manifest.sampling.kind
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise VqdeployError("this PyTorch has no CUDA", fix="pip install torch")
            torch.backends.cudnn.allow_tf32 = False  # plans in fp32 have none either
        self.system = checkpoints.source(manifest.config, origin.checkpoint, checkpoint, pipeline.bundle.path)
        self.dtype = DTYPES["fp16" if manifest.precision == "fp16" else "fp32"]
        self.system.to(self.device, self.dtype)

    def call(self, task: str, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        """A call that does the task once. If it returns a number, that is its extrapolated time in seconds."""
        run = {"encode": self._encode, "decode": self._decode, "generate": self._generate}[task](
            batch, pipeline, compiled
        )
        done = run if self.device == "cpu" else partial(_finished, run)

        def limited() -> object:
            with torch_threads(self._threads):  # the compiler of PyTorch reads it at the first call
                return done()

        return torch.inference_mode()(limited)

    def _encode(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        images = torch.rand(batch, 3, *pipeline.image_shape[:2], device=self.device, dtype=self.dtype) * 2 - 1
        encode = _compile(self.system.tokenizer.encode, compiled)
        return lambda: encode(images)

    def _decode(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        for norm in self.system.tokenizer.modules():
            if isinstance(norm, SpatialNorm):
                norm.forward = partial(enlarge_first, norm)  # type: ignore[method-assign]
        codes = torch.randint(pipeline.codebook_size, (batch, *pipeline.grid), device=self.device)
        decode = _compile(self.system.tokenizer.decode, compiled)
        return lambda: decode(codes)

    def _generate(self, batch: int, pipeline: Pipeline, compiled: bool) -> Callable[[], object]:
        if self._kind == "hierarchical":
            return partial(extrapolate, self.system.prior, batch, compiled, self.device)
        prior, config = self.system.prior, self.system.config
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **self.options))
        labels = torch.from_numpy(pipeline.condition.examples(batch)).to(self.device)
        if compiled:
            # The cache of each layer, empty or filled, is compiled separately.
            torch._dynamo.config.recompile_limit = 256
            prior = copy.copy(prior)
            prior._modules = dict(prior._modules)
            for name in ("transformer", "body_transformer", "head_transformer"):
                if hasattr(prior, name):
                    setattr(prior, name, torch.compile(getattr(prior, name), dynamic=True))
            for name in ("blocks", "layers"):
                if hasattr(prior, name):
                    layers: Any = [torch.compile(layer, dynamic=True) for layer in getattr(prior, name)]
                    setattr(prior, name, nn.ModuleList(layers))
        return lambda: generate(prior, config, labels, _noise)


def _finished(call: Callable[[], object]) -> object:
    """Adds a synchronization, since calls on a GPU are asynchronous."""
    result = call()
    torch.cuda.synchronize()
    return result


def extrapolate(prior: VQVAE2Prior, batch: int, compiled: bool, device: str = "cpu") -> float:
    """Extrapolated seconds of the public sampler of VQ-VAE-2, which runs the whole network for each position.

    Times a few positions, in rows from the first to the last, and interpolates linearly between them.
    """
    seconds = 0.0
    labels, above = torch.zeros(batch, dtype=torch.int64, device=device), None
    for network in prior.levels:
        height, width = network.config.grid
        codes = torch.zeros(batch, height, width, dtype=torch.int64, device=device)
        condition, forward = network.embed_condition(labels, above), _compile(network, compiled)
        rows, times = np.unique(np.linspace(1, height, _TIMED_ROWS).astype(int)), []
        for count in rows:
            start = time.perf_counter()
            forward(codes[:, :count], condition)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds += width * np.interp(np.arange(1, height + 1), rows, times).sum()
        above = codes
    return seconds


def enlarge_first(norm: SpatialNorm, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """`SpatialNorm` in the order of the public code: upsample the condition, then convolve it."""
    enlarged = F.interpolate(condition, x.shape[-2:])
    modulated: torch.Tensor = norm.norm_layer(x) * norm.conv_y(enlarged) + norm.conv_b(enlarged)
    return modulated


def _noise(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that the plan would use."""
    return torch.from_numpy(noise_of(0, range(shape[0]), index, shape[1:]))


def _compile(function: Callable[P, T], compiled: bool) -> Callable[P, T]:
    return torch.compile(function) if compiled else function
