"""The base class of tokenizers."""

from typing import Any

from torch import Tensor, nn

from vqdeploy.models.quantizers import Quantized


class Tokenizer(nn.Module):
    """Images are float [B, 3, H, W] in `config.pixel_range`, codes int64 [B, h, w, Q].

    Subclasses have `latents` (image -> vectors [B, h, w, D]), `quantizer`, `reconstruct` (vectors -> image), and
    `last_weight`, the weight of the output layer, for balancing the adversarial loss.
    """

    config: Any
    latents: Any
    reconstruct: Any
    quantizer: Any
    any_size = False
    """Whether it accepts all image sizes divisible by its downsampling factor."""
    omits_depths = False
    """Whether `decode` accepts -1 to skip a depth of a position, as for residual quantization."""

    @property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Height, width and depth of each code map of an image, coarse to fine."""
        return (self.config.grid,)

    def encode(self, x: Tensor) -> Tensor:
        """Image -> codes."""
        return self.quantizer.encode(self.latents(x))[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> image. With a residual quantizer, -1 skips a depth."""
        return self.reconstruct(self.quantizer.decode(codes))

    def distances(self, x: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [B, h, w, Q, K] of image vectors from the codebook, given the codes before each."""
        return self.quantizer.distances(self.latents(x), codes)

    def depths(self, codes: Tensor) -> tuple[Tensor, ...]:
        """The codes of each depth [B, h, w]."""
        return codes.unbind(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Image -> its reconstruction and quantization."""
        quantized = self.quantizer(self.latents(x))
        return self.reconstruct(quantized.vectors), quantized
