"""The base class of tokenizers."""

from typing import Protocol

from torch import Tensor, nn

from vqdeploy.models.conv import Decoder, Encoder
from vqdeploy.models.quantizers import Quantized, Quantizer


class TokenizerConfig(Protocol):
    """The interface of tokenizer configurations."""

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
    """Images are float [B, 3, H, W] in `config.pixel_range`, codes int64 [B, *grid], mostly [B, h, w, Q].

    Subclasses add `latents`, `quantizer`, `reconstruct` and `last_weight`.
    """

    config: TokenizerConfig
    quantizer: Quantizer
    any_size = False
    """Whether it accepts all image sizes divisible by its downsampling factor."""
    omits_depths = False
    """Whether `decode` accepts -1 to skip a depth of a position, as for residual quantization."""

    @property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Height, width and depth of each code map of an image, coarse to fine."""
        return (self.config.grid,)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the output layer, for balancing the adversarial loss.

        Raises:
            NotImplementedError: In this class.
        """
        raise NotImplementedError

    def latents(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors before quantization [B, h, w, D].

        Raises:
            NotImplementedError: In this class.
        """
        raise NotImplementedError

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D] -> images [B, 3, H, W].

        Raises:
            NotImplementedError: In this class.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> codes int64 [B, *grid]."""
        return self.quantizer.encode(self.latents(x))[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, *grid] -> images [B, 3, H, W]. With a residual quantizer, -1 skips a depth."""
        return self.reconstruct(self.quantizer.decode(codes))

    def distances(self, x: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [B, *grid, K] of the vectors of images from the codebook, given the codes before each.

        Args:
            x: Images [B, 3, H, W].
            codes: Codes int64 [B, *grid].
        """
        return self.quantizer.distances(self.latents(x), codes)

    def depths(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes int64 [B, h, w, Q] -> the codes of each depth [B, h, w]."""
        return codes.unbind(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Images [B, 3, H, W] -> their reconstructions [B, 3, H, W] and quantization, in training."""
        quantized = self.quantizer(self.latents(x))
        return self.reconstruct(quantized.vectors), quantized


class ConvTokenizer(Tokenizer):
    """A tokenizer of VQGAN's encoder and decoder, with a convolution on either side of the quantizer."""

    encoder: Encoder
    decoder: Decoder
    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    @property
    def last_weight(self) -> Tensor:
        """Weight of the output convolution."""
        return self.decoder.conv_out.weight

    def latents(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors before quantization [B, h, w, D]."""
        vectors: Tensor = self.quant_conv(self.encoder(x))
        return vectors.permute(0, 2, 3, 1)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D] -> images [B, 3, H, W]."""
        image: Tensor = self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return image
