"""Stage 2: the prior learns the codes of the frozen tokenizer."""

import logging

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from vqdeploy.models.pixels import to_range
from vqdeploy.systems import SYSTEMS, Recipe, System
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.metrics import generate
from vqdeploy.training.stage import schedule

log = logging.getLogger("vqdeploy")
_SAMPLES = 10  # samples per class for validation


class PriorTraining(LightningModule):
    """Trains with the loss of the system. `classifier` judges samples; None without classes."""

    def __init__(self, system: System, recipe: Recipe, classifier: ImageClassifier | None):
        super().__init__()
        self.system, self.recipe, self.classifier = system, recipe, classifier
        if hasattr(system.prior, "codebook"):  # moving to a device may have separated the shared tensor
            system.prior.codebook = system.tokenizer.quantizer.codebook
        system.prior.train()  # Lightning does not change modes
        for frozen in filter(None, (system.tokenizer, classifier)):
            frozen.requires_grad_(False).eval()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the betas and weight decay of the RQ-Transformer, for every prior."""
        parameters = self.system.prior.parameters()
        optimizer = torch.optim.AdamW(parameters, self.recipe.prior_learning_rate, (0.9, 0.95), weight_decay=1e-4)
        scheduler = schedule(optimizer, self.recipe.prior_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss on augmented images, or on codes."""
        loss = self._loss(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Reports the loss on held-out images."""
        self.log("held_out_loss", self._loss(*batch), prog_bar=True, batch_size=len(batch[0]))

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        x = to_range(images, self.system.config.tokenizer.pixel_range) if images.dtype == torch.uint8 else images
        loss = SYSTEMS[self.system.config.model].loss
        return loss(self.system, x, labels, self.recipe, not self.trainer.validating)

    def on_validation_epoch_end(self) -> None:
        """Reports the class accuracy of samples."""
        values = {"held_out_loss": float(self.trainer.callback_metrics["held_out_loss"])}
        if self.classifier is not None:
            labels = torch.arange(self.system.config.prior.classes).repeat_interleave(_SAMPLES)
            values["class_accuracy"] = self.classifier.accuracy(generate(self.system, labels, seed=0), labels)
            self.log("class_accuracy", values["class_accuracy"], prog_bar=True)
        log.info("prior: %s", ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
