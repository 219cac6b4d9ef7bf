"""Losses of priors; signature `vqdeploy.systems.system.Loss`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqdeploy.systems.recipe import Recipe
from vqdeploy.systems.system import System


def soft_target_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy with soft targets on drawn codes (RQ-VAE, section 3.3); of codes, with hard targets."""
    if not x.is_floating_point():
        return F.cross_entropy(system.prior.logits(x, labels).flatten(0, -2), x.flatten())
    codes, targets = system.tokenizer.soft_codes(x, recipe.soft_temperature)
    return F.cross_entropy(system.prior.logits(codes, labels).flatten(0, -2), targets.flatten(0, -2))


def masked_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy with smoothed labels on masked codes (MaskGIT, section 3.1).

    The masked fraction of each image is the cosine schedule at a random time. In training some labels are dropped, for
    classifier-free guidance (Ho and Salimans, 2022).
    """
    config = system.config.prior
    codes = _codes(system, x)
    cells = codes[0].numel()
    shares = torch.cos(torch.pi / 2 * torch.rand(len(codes), device=codes.device))
    ranks = torch.rand(len(codes), cells, device=codes.device).argsort(1).argsort(1)
    masked = (ranks < (shares * cells).ceil()[:, None]).view_as(codes)
    if training and config.null_label:
        labels = _drop_some(labels, recipe.label_dropout, none=config.classes)
    logits = system.prior.logits(codes.masked_fill(masked, config.codebook_size), labels)
    return F.cross_entropy(logits[masked], codes[masked], label_smoothing=recipe.label_smoothing)


def next_code_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy of each code given those before it; in training some labels are dropped, as in `masked_loss`."""
    codes = _codes(system, x)
    if training and system.config.prior.null_label:
        labels = _drop_some(labels, recipe.label_dropout, none=system.config.prior.classes)
    return F.cross_entropy(system.prior.logits(codes, labels).flatten(0, -2), codes.flatten())


def level_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy of each code given those before it, averaged over each level and summed over the levels."""
    codes = _codes(system, x)
    losses = F.cross_entropy(system.prior.logits(codes, labels).transpose(1, 2), codes, reduction="none")  # [B, N]
    return torch.stack([level.mean() for level in system.tokenizer.depths(losses)]).sum()


def _codes(system: System, x: Tensor) -> Tensor:
    """The codes of images, or codes as they are."""
    with torch.no_grad():
        return system.tokenizer.encode(x) if x.is_floating_point() else x


def _drop_some(labels: Tensor, share: float, none: int) -> Tensor:
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < share, none)
