"""The interface of priors, and the base of configurations of those that have one code map."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vqdeploy.config import Config


class PriorConfig(Protocol):
    """The interface of configurations of priors."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""

    @property
    def depth(self) -> int:
        """Codes per position."""

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""

    @property
    def classes(self) -> int:
        """Number of labels; the label of this number means none, where a prior knows it."""


class Prior(Protocol):
    """A network that gives logits of codes."""

    @property
    def config(self) -> PriorConfig:
        """Its configuration."""

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes int64 [B, *grid] and labels int64 [B] -> logits [..., K] of each code, teacher-forced or unmasked."""


class AutoregressivePrior(Prior, Protocol):
    """A prior that draws its codes one after the other."""

    def generate(self, labels: Tensor, noise: Callable[[int], Tensor], *options: Tensor | float) -> Tensor:
        """Samples codes int64 [B, *grid].

        Args:
            labels: Labels int64 [B].
            noise: Index of a draw -> Gumbel noise float32 [B, Q, K].
            *options: Temperature, top-k and top-p [B, Q], and the guidance scale if there is one.
        """


@dataclass(frozen=True)
class MapConfig(Config):
    """Base of configurations of priors with one code map; `grid` is its height, width and depth."""

    grid: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Number of positions of the code map."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Number of codes per position."""
        return self.grid[2]
