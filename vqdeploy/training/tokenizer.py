"""Stage 1: the tokenizer learns to reconstruct (section 3.1 of the RQ-VAE paper)."""

import logging
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vqdeploy.models.pixels import to_range, to_uint8
from vqdeploy.models.vqvae2 import AnyTokenizer
from vqdeploy.systems import Recipe
from vqdeploy.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from vqdeploy.training.metrics import codebook_use, psnr
from vqdeploy.training.perceptual import perceptual_network
from vqdeploy.training.stage import schedule

log = logging.getLogger("vqdeploy")

T = TypeVar("T")


def logit_laplace(reconstruction: Tensor, x: Tensor, margin: float = 0.1) -> Tensor:
    """Logit-Laplace loss on pixels in 0..1, mapped to margin..1 - margin (DALL-E, appendix A.3).

    The negative log-likelihood of a Laplace distribution of scale 1 in logit space, up to constants: a scalar, for
    images [...] of one shape.
    """
    made, target = ((1 - 2 * margin) * pixels + margin for pixels in (reconstruction, x))
    return F.l1_loss(torch.logit(made, eps=margin / 2), torch.logit(target))


class TokenizerTraining(LightningModule):
    """Trains with squared error and commitment loss, and optional perceptual and adversarial losses.

    Uses manual optimization, because the adversarial loss has a second optimizer.
    """

    automatic_optimization = False

    def __init__(self, tokenizer: AnyTokenizer, recipe: Recipe):
        super().__init__()
        # Lightning does not change modes, and the codebook is updated in training mode only.
        self.tokenizer, self.recipe = tokenizer.train(), recipe
        self.discriminator = PatchDiscriminator() if recipe.adversarial_weight else None
        # In a list, to keep the frozen weights out of the state_dict.
        self.perceptual = [perceptual_network()] if recipe.perceptual_weight else []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam for the tokenizer and the discriminator, if any."""
        networks = [network for network in (self.tokenizer, self.discriminator) if network is not None]
        optimizers = [torch.optim.Adam(n.parameters(), self.recipe.learning_rate, (0.5, 0.9)) for n in networks]
        return optimizers, [schedule(optimizer, self.recipe.steps) for optimizer in optimizers]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """One step of the tokenizer, then one of the discriminator."""
        x = to_range(batch[0], self.tokenizer.config.pixel_range)
        reconstruction, quantized = self.tokenizer(x)
        error = F.mse_loss(reconstruction, x)
        self.log("mse", error, prog_bar=True)
        loss = error + self._perceptual(reconstruction, x)
        if self.recipe.logit_laplace_weight:
            loss = loss + self.recipe.logit_laplace_weight * logit_laplace(self._unit(reconstruction), self._unit(x))
        if self.discriminator:
            loss = loss + self._adversarial(self.discriminator(reconstruction), loss)
        loss = loss + self.tokenizer.config.commitment_weight * quantized.commitment_loss
        self._step(0, loss + quantized.codebook_loss)
        if self.discriminator:
            logits = self.discriminator(x), self.discriminator(reconstruction.detach())
            self._step(1, self.recipe.adversarial_weight * discriminator_loss(*logits))

    def _unit(self, pixels: Tensor) -> Tensor:
        """Pixels in the range of the model -> 0..1."""
        low, high = self.tokenizer.config.pixel_range
        unit: Tensor = (pixels - low) / (high - low)
        return unit

    def _perceptual(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        images = [2 * self._unit(pixels) - 1 for pixels in (reconstruction, x)]
        terms = [network.to(x.device)(*images).mean() for network in self.perceptual]
        return self.recipe.perceptual_weight * sum(terms, x.new_zeros(()))

    def _adversarial(self, logits: Tensor, loss: Tensor) -> Tensor:
        generator = generator_loss(logits)
        balance = adaptive_weight(loss, generator, self.tokenizer.last_weight)
        self.log_dict({"generator": generator, "balance": balance}, prog_bar=True)
        return self.recipe.adversarial_weight * balance * generator

    def _step(self, which: int, loss: Tensor) -> None:
        optimizer = _pick(cast("Optimizer | list[Optimizer]", self.optimizers()), which)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        _pick(cast("LambdaLR | list[LambdaLR]", self.lr_schedulers()), which).step()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Collects held-out images, reconstructions and codes."""
        images, pixel_range = batch[0], self.tokenizer.config.pixel_range
        codes = self.tokenizer.encode(to_range(images, pixel_range))
        self.seen.append((images, to_uint8(self.tokenizer.decode(codes), pixel_range), codes))

    def on_validation_epoch_end(self) -> None:
        """Reports PSNR and codebook usage."""
        images, reconstructions, codes = (torch.cat(part) for part in zip(*self.seen, strict=True))
        self.seen.clear()
        use = codebook_use(self.tokenizer.depths(codes), self.tokenizer.config.codebook_size)
        values = {name: sum(depths) / len(depths) for name, depths in use.items()}
        values = {"psnr": psnr(reconstructions, images), **values}
        self.log_dict(values, prog_bar=True)
        log.info("tokenizer: %s", ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def _pick(group: T | list[T], which: int) -> T:
    """An optimizer or scheduler by index; Lightning returns a list only for several."""
    return group[which] if isinstance(group, list) else group
