"""What tokenizers have in common."""

from typing import Protocol

from torch import Tensor, nn

from vqdeploy.models.quantizers import Quantized, Quantizer


class TokenizerConfig(Protocol):
    """What is asked of the configuration of every tokenizer."""

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""

    @property
    def commitment_weight(self) -> float:
        """Weight of the commitment loss."""

    @property
    def pixel_range(self) -> tuple[float, ...]:
        """Range of the images inside the model."""


class Tokenizer(nn.Module):
    """Images are float [B, 3, H, W] in `config.pixel_range`, codes int64 [B, h, w, Q].

    An architecture adds `latents`, `reconstruct`, the quantizer between, and `last_weight`.
    """

    config: TokenizerConfig
    quantizer: Quantizer
    any_size = False
    """Whether images of any size that the factor divides can be taken, as convolutions allow."""
    omits_depths = False
    """Whether -1 leaves a depth of a position out, as residual quantization allows."""

    @property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Height, width and depth of each code map of an image, coarse to fine."""
        return (self.config.grid,)

    @property
    def last_weight(self) -> Tensor:
        """The weight of the layer that makes the image, against which an adversarial loss is balanced."""
        raise NotImplementedError

    def latents(self, x: Tensor) -> Tensor:
        """Image -> vectors before quantization [B, h, w, D]."""
        raise NotImplementedError

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D] -> image."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Image -> codes."""
        return self.quantizer.encode(self.latents(x))[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> image. With a residual quantizer -1 leaves a depth out."""
        return self.reconstruct(self.quantizer.decode(codes))

    def distances(self, x: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [B, h, w, Q, K] of an image's vectors from the codebook, given the codes before each."""
        return self.quantizer.distances(self.latents(x), codes)

    def depths(self, codes: Tensor) -> tuple[Tensor, ...]:
        """The codes of each depth [B, h, w]."""
        return codes.unbind(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Image -> its reconstruction, and the quantization behind it."""
        quantized = self.quantizer(self.latents(x))
        return self.reconstruct(quantized.vectors), quantized
