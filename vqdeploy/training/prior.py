"""Stage 2: the prior learns the codes of the frozen tokenizer."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from vqdeploy.models.pixels import to_range
from vqdeploy.systems import System
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.metrics import generate
from vqdeploy.training.recipe import Recipe
from vqdeploy.training.stage import schedule

logger = logging.getLogger("vqdeploy")
_SAMPLES = 10  # of each class, to watch the training by


def soft_target_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy with soft targets on drawn codes (RQ-VAE, section 3.3)."""
    codes, targets = system.tokenizer.soft_codes(x, recipe.soft_temperature)
    return F.cross_entropy(system.prior.logits(codes, labels).flatten(0, -2), targets.flatten(0, -2))


def masked_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy with smoothed labels on masked codes (MaskGIT, section 3.1).

    The masked share of each image follows the cosine schedule at a random place. In training some labels are dropped,
    so that the prior can guide itself (Ho and Salimans, 2022).
    """
    config = system.config.prior
    with torch.no_grad():
        codes = system.tokenizer.encode(x)
    cells = codes[0].numel()
    shares = torch.cos(torch.pi / 2 * torch.rand(len(codes), device=codes.device))
    ranks = torch.rand(len(codes), cells, device=codes.device).argsort(1).argsort(1)
    masked = (ranks < (shares * cells).ceil()[:, None]).view_as(codes)
    if training:
        labels = _drop_some(labels, recipe.label_dropout, none=config.classes)
    logits = system.prior.logits(codes.masked_fill(masked, config.codebook_size), labels)
    return F.cross_entropy(logits[masked], codes[masked], label_smoothing=recipe.label_smoothing)


def next_code_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy of each code given those before it; in training some labels are dropped, as in `masked_loss`."""
    with torch.no_grad():
        codes = system.tokenizer.encode(x)
    if training:
        labels = _drop_some(labels, recipe.label_dropout, none=system.config.prior.classes)
    return F.cross_entropy(system.prior.logits(codes, labels).flatten(0, -2), codes.flatten())


def level_loss(system: System, x: Tensor, labels: Tensor, recipe: Recipe, training: bool) -> Tensor:
    """Cross entropy of each code given those before it, averaged over each level and summed over the levels."""
    with torch.no_grad():
        codes = system.tokenizer.encode(x)
    losses = F.cross_entropy(system.prior.logits(codes, labels).transpose(1, 2), codes, reduction="none")  # [B, N]
    return torch.stack([level.mean() for level in system.tokenizer.depths(losses)]).sum()


def _drop_some(labels: Tensor, share: float, none: int) -> Tensor:
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < share, none)


_LOSSES = {
    "rqvae": soft_target_loss,
    "movq": masked_loss,
    "vitvqgan": next_code_loss,
    "vqgan": next_code_loss,
    "vqvae2": level_loss,
}


class PriorTraining(LightningModule):
    """The loss of the system. `classifier` judges samples; there is none without classes."""

    def __init__(self, system: System, recipe: Recipe, classifier: ImageClassifier | None):
        super().__init__()
        self.system, self.recipe, self.classifier = system, recipe, classifier
        if hasattr(system.prior, "codebook"):  # a device may have parted the two, which share it
            system.prior.codebook = system.tokenizer.quantizer.codebook
        system.prior.train()  # Lightning leaves modes as they are
        for frozen in filter(None, (system.tokenizer, classifier)):
            frozen.requires_grad_(False).eval()

    def configure_optimizers(self) -> Any:
        """AdamW, with the betas and the weight decay of the RQ-Transformer for every prior."""
        parameters = self.system.prior.parameters()
        optimizer = torch.optim.AdamW(parameters, self.recipe.prior_learning_rate, (0.9, 0.95), weight_decay=1e-4)
        scheduler = schedule(optimizer, self.recipe.prior_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss on augmented images."""
        loss = self._loss(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Reports the loss on held-out images."""
        self.log("held_out_loss", self._loss(*batch), prog_bar=True, batch_size=len(batch[0]))

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        x = to_range(images, self.system.config.tokenizer.pixel_range)
        loss = _LOSSES[self.system.config.model]
        return loss(self.system, x, labels, self.recipe, training=not self.trainer.validating)

    def on_validation_epoch_end(self) -> None:
        """Reports the share of samples that the classifier puts in the class that was asked for."""
        values = {"held_out_loss": float(self.trainer.callback_metrics["held_out_loss"])}
        if self.classifier is not None:
            labels = torch.arange(self.system.config.prior.classes).repeat_interleave(_SAMPLES)
            values["class_accuracy"] = self.classifier.accuracy(generate(self.system, labels, seed=0), labels)
            self.log("class_accuracy", values["class_accuracy"], prog_bar=True)
        logger.info("prior: %s", ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
