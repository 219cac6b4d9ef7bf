"""Rounds matrices to 7 or 4 bits, with the error compensated by what is known of their inputs.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023): each
input's rounding error is made up for by the weights of the inputs that are yet to be rounded.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from vqdeploy import reference
from vqdeploy.checkpoint import check_finite
from vqdeploy.errors import VqdeployError
from vqdeploy.models.prior import Prior
from vqdeploy.systems import SYSTEMS, System

BLOCK = 32
"""Inputs that share a scale."""

_LARGEST_OF_COLUMNS = 63  # 7 bits: AVX2 adds two products with 8-bit activations in int16, where 8 bits overflow
_LARGEST = 7
_SMALLEST = -8
_DAMPING = 0.01  # of the mean, added to all squares of inputs
_RANDOM, _DRAWN = 1024, 3072  # positions of the codes that layers are observed on
_TOLD = 64  # steps of a draw between two lines of progress

log = logging.getLogger("vqdeploy")


@contextmanager
def observed(system: System, progress: Callable[[str], object] = log.info) -> Iterator[None]:
    """Within it each linear layer of the prior has `moment`, the sums of products of its inputs [inputs, inputs].

    It also has `largest`, the absolute values of its largest outputs [outputs].

    The inputs are those for codes that the prior draws with its default options and, as a user's may differ, random
    ones. `progress` is called with what is done meanwhile.

    Raises:
        ArtifactError: A weight of the prior is not finite.
    """
    prior = cast(nn.Module, system.prior)
    check_finite(dict(prior.named_parameters()), "the prior")
    layers = [layer for layer in prior.modules() if isinstance(layer, nn.Linear)]
    training = prior.training
    try:
        prior.eval()
        examples = _examples(system, progress)
        progress("weights, rounded by the inputs of layers")
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.callback(layer.register_forward_hook(_observe).remove)
            for codes, conditions in examples:
                system.prior.logits(codes, conditions)
        yield
    finally:
        prior.train(training)
        for layer in layers:
            for name in ("moment", "largest"):
                vars(layer).pop(name, None)


def _examples(system: System, progress: Callable[[str], object]) -> list[tuple[Tensor, Tensor]]:
    """Random codes and drawn ones, in a masked prior partly masked, and their conditions."""
    config, generator = system.config.prior, torch.Generator().manual_seed(0)
    random, drawn = (max(1, count // math.prod(config.grid[:2])) for count in (_RANDOM, _DRAWN))

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        if step % _TOLD == 0:
            progress(f"weights, rounded by codes that the prior draws: step {step}")
        return -torch.empty(shape).exponential_(generator=generator).log()

    conditions = [_conditions(system.prior, images, generator) for images in (random, drawn)]
    codes = [
        torch.randint(config.codebook_size, (random, *config.grid), generator=generator),
        reference.generate(system.prior, system.config, conditions[1], noise),
    ]
    if SYSTEMS[system.config.model].kind == "masked":
        for each in codes:
            share = torch.rand(len(each), *[1] * len(config.grid), generator=generator)
            each[torch.rand(each.shape, generator=generator) < share] = config.codebook_size
    return list(zip(codes, conditions, strict=True))


def _conditions(prior: Prior, images: int, generator: torch.Generator) -> Tensor:
    """Random labels, texts or features of texts."""
    config, length = prior.config, getattr(prior.config, "condition_length", 1)
    if width := getattr(config, "text_width", 0):
        return torch.randn(images, length, width, generator=generator)
    return torch.randint(config.classes, (images, *([length] if length > 1 else [])), generator=generator)


def _observe(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    rows, largest = inputs[0].flatten(0, -2), output.abs().flatten(0, -2).amax(0)
    layer.moment = getattr(layer, "moment", 0) + rows.T @ rows
    layer.largest = torch.maximum(getattr(layer, "largest", largest), largest)


def rounded(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rounds a matrix [inputs, outputs] to 4 bits; `moment` [inputs, inputs] is that of its inputs, None if not known.

    Returns:
        Integers -8..7 int8 [inputs, outputs], and what one is worth in each block of inputs [blocks, outputs].
    """

    def widest(block: Tensor) -> Tensor:
        scale = torch.maximum(block.amax(0) / _LARGEST, block.amin(0) / _SMALLEST)
        return torch.where(scale > 0, scale, 1.0)

    return _compensated(weight, moment, _SMALLEST, _LARGEST, widest)


def _compensated(
    weight: Tensor, moment: Tensor | None, smallest: int, largest: int, scale_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """GPTQ to integers `smallest`..`largest`, to the nearest without a moment.

    `scale_of` gives the scales of a block of inputs [BLOCK, outputs].
    """
    if moment is None:
        blocks = [(block, scale_of(block)) for block in weight.split(BLOCK)]
        nearest = [(block / scale).round().clamp(smallest, largest) for block, scale in blocks]
        return torch.cat(nearest).to(torch.int8), torch.stack([scale for _, scale in blocks])
    rest, integers, scales = weight.clone(), torch.empty_like(weight), []
    inverse = _inverse(moment)
    for start in range(0, len(weight), BLOCK):
        block = slice(start, min(start + BLOCK, len(weight)))
        scale = scale_of(rest[block])
        errors = torch.empty_like(rest[block])
        for i in range(start, block.stop):
            integers[i] = (rest[i] / scale).round().clamp(smallest, largest)
            errors[i - start] = (rest[i] - integers[i] * scale) / inverse[i, i]
            rest[i + 1 : block.stop] -= inverse[i, i + 1 : block.stop, None] * errors[i - start]
        rest[block.stop :] -= inverse[block, block.stop :].T @ errors
        scales.append(scale)
    return integers.to(torch.int8), torch.stack(scales)


def _inverse(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: row i has what an error of input i asks of the inputs behind it."""
    if not moment.isfinite().all():
        raise VqdeployError("activations are too large to round weights by them", fix="--dtype fp32")
    moment = moment.double()
    damped = moment + (_DAMPING * moment.diagonal().mean() + 1e-12) * torch.eye(len(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def rounded_columns(
    weight: Tensor, smallest: Tensor | float = 0.0, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds a matrix [inputs, outputs] to 7 bits; `moment` as for `rounded`.

    Returns:
        Integers -63..63 int8 [inputs, outputs], and what one is worth in each column [outputs]: the scale with the
        smallest squared error, since cutting off the largest weights may pay, or `smallest` if it is below that.
    """
    most = _LARGEST_OF_COLUMNS
    largest = weight.abs().amax(0)
    widest = torch.where(largest > 0, largest / most, 1.0)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in torch.linspace(1, 0.6, 21):
        scale = widest * share
        error = ((weight / scale).round().clamp(-most, most) * scale - weight).square().sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    best = torch.maximum(best, torch.as_tensor(smallest))
    return _compensated(weight, moment, -most, most, lambda _: best)[0], best
