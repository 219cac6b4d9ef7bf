"""What an image is conditioned on: a class label, or the token ids of a text."""

from dataclasses import dataclass

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.arguments import as_numbers
from vqdeploy.runtime.interface import Expected, whole
from vqdeploy.runtime.manifest import SamplingInfo


@dataclass(frozen=True)
class Condition:
    """The conditions that a prior takes, int64 [B, *shape].

    Attributes:
        name: The graph input that takes them, `label` or `text`.
        shape: Shape of the condition of an image: () for a label, (length,) for a text.
        size: Number of labels, or of token ids.
    """

    name: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, sampling: SamplingInfo) -> "Condition":
        """Those of a manifest."""
        text = sampling.text
        return cls("label", (), sampling.classes) if text is None else cls("text", (text.length,), text.vocabulary)

    @property
    def input(self) -> dict[str, Expected]:
        """What a sampler expects of the graph input."""
        return {self.name: whole(*self.shape)}

    @property
    def length(self) -> int:
        """Entries of an autoregressive prior that the condition takes."""
        return self.shape[0] if self.shape else 1

    def check(self, given: object, count: int | None = None) -> np.ndarray:
        """Conditions of a request as an array.

        Args:
            given: Labels, a list or an array [B]; or texts [B, length].
            count: Number of images, if it is known.

        Raises:
            VqdeployError: There are too few or too many, or one is malformed or out of range.
        """
        array = as_numbers(f"the list of {self.name}s", given, whole=True)
        if array.ndim != 1 + len(self.shape) or array.shape[1:] != self.shape or count not in (None, len(array)):
            raise self._misshapen(array, count)
        if wrong := array[(array < 0) | (array >= self.size)].tolist():
            what = "a label" if self.name == "label" else "a token id"
            raise VqdeployError(f"{what} is out of range", expected=f"0..{self.size - 1}", found=wrong[0])
        return array

    def _misshapen(self, array: np.ndarray, count: int | None) -> VqdeployError:
        if self.name == "text":
            expected = f"token ids [{'B' if count is None else count}, {self.length}]"
            return VqdeployError("this prior is conditioned on texts", expected=expected, found=list(array.shape))
        expected = "a list of one for each image" + ("" if count is None else f" ({count})")
        found = array.tolist() if array.ndim < 2 else f"an array {list(array.shape)}"
        return VqdeployError("there are too few or too many labels", expected=expected, found=found)

    def missing(self) -> VqdeployError:
        """The error of a request without conditions."""
        if self.name == "text":
            return VqdeployError("this prior needs texts", expected=f"token ids [B, {self.length}]", found="none")
        return VqdeployError("this prior needs labels", expected=f"labels in 0..{self.size - 1}", found="none")

    def examples(self, count: int) -> np.ndarray:
        """Conditions to check or to time a plan with: every label in turn, or random texts."""
        if self.name == "label":
            return np.arange(count) % self.size
        return np.random.default_rng(0).integers(0, self.size, (count, *self.shape))
