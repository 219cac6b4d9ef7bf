"""A small classifier of the real images, which judges class-conditional samples."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vqdeploy.models.pixels import to_range
from vqdeploy.systems import Recipe
from vqdeploy.training.stage import schedule


class ImageClassifier(LightningModule):
    """Images uint8 [B, 3, R, R] -> logits [B, classes]."""

    def __init__(self, classes: int, recipe: Recipe, channels: int = 16):
        super().__init__()
        self.recipe = recipe
        widths = (3, channels, 2 * channels, 4 * channels)
        levels = [_level(*pair) for pair in pairwise(widths)]
        pool = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3)
        self.layers = nn.Sequential(*levels, *pool, nn.Linear(widths[-1] * 16, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(to_range(images, (-1.0, 1.0)))
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW."""
        optimizer = torch.optim.AdamW(self.parameters(), self.recipe.classifier_learning_rate)
        scheduler = schedule(optimizer, self.recipe.classifier_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Reports the accuracy on held-out images."""
        hits = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", hits, prog_bar=True, batch_size=len(batch[0]))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Accuracy, 0..1, on images uint8 [N, 3, R, R] with labels int64 [N]."""
        self.eval()
        parts = zip(torch.split(images, 256), torch.split(labels, 256), strict=True)
        hits = [self(i.to(self.device)).argmax(1).cpu() == label for i, label in parts]
        return float(torch.cat(hits).float().mean())


def _level(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
