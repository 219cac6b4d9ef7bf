"""The adversarial term of VQGAN and RQ-VAE: a patch discriminator, hinge losses and the adaptive weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images [B, 3, H, W] -> one logit per patch [B, 1, h, w] (Isola et al., "pix2pix", CVPR 2017)."""

    def __init__(self, channels: int = 64, layers: int = 2):
        super().__init__()
        self.extend([nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)])
        for layer in range(1, layers + 1):
            inputs, outputs = channels * 2 ** (layer - 1), channels * 2**layer
            stride = 1 if layer == layers else 2
            convolution = nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False)
            self.extend([convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)])
        self.append(nn.Conv2d(outputs, 1, 4, padding=1))
        self.apply(_initialize)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on the logits [...] of real and reconstructed images, a scalar."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Loss of the tokenizer: the negative mean logit of reconstructed images, a scalar."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the gradient norms of both losses at the output layer of the decoder, in 0..10,000.

    Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021), equation 7.

    Args:
        reconstruction: Reconstruction loss, a scalar.
        generator: Adversarial loss of the tokenizer, a scalar.
        last_layer: Weight of the output layer.

    Returns:
        A scalar without gradient.
    """
    of_reconstruction, of_generator = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, generator)
    )
    return torch.clamp(of_reconstruction / (of_generator + 1e-4), 0, 1e4).detach()
