"""What an image is conditioned on: a class label, the token ids of a text, or the features of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.arguments import as_array, as_numbers
from vqdeploy.runtime.interface import Expected, floats, whole
from vqdeploy.runtime.manifest import SamplingInfo
from vqdeploy.runtime.session import Array


@dataclass(frozen=True)
class Condition:
    """The conditions that a prior takes: int64 [B, *shape], or float32 [B, *shape] for features.

    The features of a text are a row for each of its tokens, behind rows of zeros that fill it up to the longest.

    Attributes:
        name: The graph input that takes them, `label` or `text`.
        shape: Shape of the condition of an image: () for a label, (length,) for the ids of a text, (length, width) for
            its features.
        size: Number of labels, or of token ids.
    """

    name: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, sampling: SamplingInfo) -> "Condition":
        """The conditions that a manifest describes."""
        text = sampling.text
        if text is None:
            return cls("label", (), sampling.classes)
        return cls("text", (text.length, text.width), 0) if text.width else cls("text", (text.length,), text.vocabulary)

    @property
    def features(self) -> bool:
        """Whether texts are given as features, each with its own number of tokens."""
        return len(self.shape) == 2

    @property
    def argument(self) -> str:
        """Name of the field of requests, and of the option, that has a condition."""
        return "label" if self.name == "label" else "text_features" if self.features else "text_ids"

    @property
    def inputs(self) -> dict[str, Expected]:
        """What a sampler expects of the graph inputs."""
        if self.features:
            return {"text": floats(*self.shape), "text_length": whole(), "label": whole()}
        return {self.name: whole(*self.shape)}

    @property
    def length(self) -> int:
        """Entries of an autoregressive prior that the condition takes at most."""
        return self.shape[0] if self.shape else 1

    def entries(self, condition: int | np.ndarray) -> int:
        """Entries of an autoregressive prior that a condition takes."""
        if self.features and np.ndim(condition):
            return int(np.asarray(condition).any(-1).sum())
        return self.length

    def write(self, inputs: Mapping[str, Array], row: int, condition: int | np.ndarray, none: int | None) -> None:
        """Writes a condition into a row of the inputs of a graph, or what stands for it if `none` is not None."""
        if not self.features:
            inputs[self.name][row] = condition if none is None else none
            return
        inputs["text"][row] = condition if np.ndim(condition) else 0
        inputs["text_length"][row] = self.entries(condition)
        inputs["label"][row] = (0 if np.ndim(condition) else condition) if none is None else none

    def check(self, given: object, count: int | None = None) -> np.ndarray:
        """Conditions of a request as an array.

        Args:
            given: Labels, a list or an array [B]; texts [B, length]; or their features [B, tokens, width], where rows
                of zeros are no tokens.
            count: Number of images, if it is known.

        Raises:
            VqdeployError: There are too few or too many, or one is malformed or out of range.
        """
        if self.features:
            return self._check_features(as_array("the list of texts", given), count)
        array = as_numbers(f"the list of {self.name}s", given, whole=True)
        if array.ndim != 1 + len(self.shape) or array.shape[1:] != self.shape or count not in (None, len(array)):
            raise self._misshapen(array, count)
        if wrong := array[(array < 0) | (array >= self.size)].tolist():
            what = "a label" if self.name == "label" else "a token id"
            raise VqdeployError(f"{what} is out of range", expected=f"0..{self.size - 1}", found=wrong[0])
        return array

    def _check_features(self, array: np.ndarray, count: int | None) -> np.ndarray:
        """Features [B, length, width], those of the tokens of each text behind rows of zeros."""
        most, width = self.shape
        fits = array.ndim == 3 and array.shape[2] == width and 1 <= array.shape[1] <= most
        if not fits or count not in (None, len(array)):
            raise self._misshapen(array, count)
        if array.dtype.kind != "f":
            raise VqdeployError("features of a text are malformed", expected="floats", found=array.dtype)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise VqdeployError("features of a text are malformed", expected="finite numbers in fp32", found="others")
        texts = np.zeros((len(array), most, width), np.float32)
        for text, rows in zip(texts, array, strict=True):
            tokens = rows[rows.any(-1)]
            if not len(tokens):
                raise VqdeployError("a text has no tokens", expected="rows that are not zero", found="zeros")
            text[most - len(tokens) :] = tokens
        return texts

    @property
    def _expected(self) -> str:
        """What a request gives, for messages."""
        if self.features:
            return f"features [B, up to {self.shape[0]}, {self.shape[1]}]"
        return f"token ids [B, {self.length}]" if self.name == "text" else f"labels in 0..{self.size - 1}"

    def _misshapen(self, array: np.ndarray, count: int | None) -> VqdeployError:
        if self.name == "text":
            expected = self._expected.replace("[B", f"[{'B' if count is None else count}")
            return VqdeployError("this prior is conditioned on texts", expected=expected, found=list(array.shape))
        expected = "a list with one for each image" + ("" if count is None else f" ({count})")
        found = array.tolist() if array.ndim < 2 else f"an array {list(array.shape)}"
        return VqdeployError("there are too few or too many labels", expected=expected, found=found)

    def missing(self) -> VqdeployError:
        """The error of a request without conditions."""
        return VqdeployError(f"this prior needs {self.name}s", expected=self._expected, found="none")

    def record(self, conditions: Sequence[int] | np.ndarray | None) -> list[object] | None:
        """Conditions of a request as lists, for its record; features are too many to repeat."""
        listed: list[object] | None = None if conditions is None or self.features else np.asarray(conditions).tolist()
        return listed

    def examples(self, count: int) -> np.ndarray:
        """Conditions to check or to time a plan with: every label in turn, or random texts."""
        if self.name == "label":
            return np.arange(count) % self.size
        return self.random(np.random.default_rng(0), count)

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random conditions; features are of texts of different lengths."""
        if not self.features:
            return rng.integers(0, self.size, (count, *self.shape))
        texts, lengths = rng.standard_normal((count, *self.shape), np.float32), rng.integers(1, self.length + 1, count)
        return texts * (np.arange(self.length) >= self.length - lengths[:, None])[..., None]
