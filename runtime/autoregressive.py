"""Key-value cached sampling: one engine call a position."""

import time
from functools import partial
from typing import Any

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.kept import kept
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.request import Callback, Request, Sampler, cells_of, still_where_greedy, write_options


class AutoregressiveSampler(Sampler):
    """Runs the `step` stage of an autoregressive prior."""

    def __init__(self, sessions: dict[str, Any], prior: dict[str, Any]):
        super().__init__()
        self._session = session = sessions["step"]
        self._bound = kept(partial(_bound, session), session.device)

    @staticmethod
    def inputs(prior: dict[str, Any]) -> dict[str, frozenset[str]]:
        """What the sampler writes to, stage by stage."""
        return {"step": frozenset(("codes", "label", "position", "noise", "temperature", "top_k", "top_p"))}

    def __call__(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """Codes int64 [B, h, w, Q]: the known ones, and samples elsewhere.

        Raises:
            VqdeployError: A position is known in part.
        """
        self.seconds.clear()
        known = request.known.reshape(len(request.known), -1, request.known.shape[-1])
        unknown = known[..., 0] < 0
        if np.any((known < 0) != unknown[..., None]):
            raise VqdeployError("a position is known in part", expected="all of its codes, or -1 for each")
        batch, positions = known.shape[:2]
        rows = self.rows(request.labels, request.options)
        needed = np.flatnonzero(unknown.any(0))
        if needed.size == 0:
            return request.known
        first = int(needed[0])
        held, binding = self._bound(rows * batch)
        if first > 0:
            caches = {name: held[name] for name in self._session.stage.aliases.values()}
            prefill = self._session.bind({"batch": rows * batch, "length": first}, caches)
            prefill.inputs["codes"][:, 1:] = np.tile(known[:, : first - 1], (rows, 1, 1))
            self._write_options(prefill, request)
            self._call(prefill, position=0)
            carry(prefill, binding)
        self._write_options(binding, request)
        # On a GPU these stay there: nothing in the loop waits for a code.
        given, codes = self._session.array(known), self._session.array(known)
        previous, drawn = held["codes"], held["next_codes"]
        for position in range(first, positions):
            if position > 0:
                for row in range(0, rows * batch, batch):
                    previous[row : row + batch, 0] = codes[:, position - 1]
            gumbel(request.seed, request.images, position, binding.inputs["noise"][:batch])
            still_where_greedy(binding.inputs)
            self._call(binding, position)
            carry(binding, binding)
            codes[:, position] = drawn[:batch]
            for image in np.flatnonzero(~unknown[:, position]):
                codes[image, position] = given[image, position]
            if callback:
                callback(position - first + 1, positions - first, np.array(codes).reshape(request.known.shape))
        return self.read("step", codes).reshape(request.known.shape)

    def _call(self, binding: Any, position: int) -> None:
        binding.inputs["position"][:] = position
        start = time.perf_counter()
        binding.run()
        self.seconds["step"] += time.perf_counter() - start

    def _write_options(self, binding: Any, request: Request) -> None:
        binding.inputs["label"][: len(request.labels)] = request.labels
        write_options(request.options, binding.inputs, size=binding.inputs["noise"].shape[-1])

    def unknown(self, mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
        """The codes to draw [B, h, w, Q], where pixels are unknown [B, H, W].

        The prior goes from the top left to the bottom right: everything from the first such row on.
        """
        rows = np.maximum.accumulate(cells_of(mask, *grid[:2]).any(2), axis=1)
        return np.broadcast_to(rows[:, :, None, None], (len(mask), *grid))

    def unknown_share(self, ratio: float, grid: tuple[int, ...], images: np.ndarray, seed: int) -> np.ndarray:
        """A share of the codes of each image [B, h, w, Q], the rows at the bottom."""
        rows = np.arange(grid[0]) >= int(grid[0] * (1 - ratio) + 1e-9)
        return np.broadcast_to(rows[:, None, None], (len(images), *grid))


class GuidedSampler(AutoregressiveSampler):
    """An autoregressive prior that was trained without labels too: label number `classes` stands for none.

    For guidance the batch is doubled: the rows of its second half have no label, and go along with those of the first.
    """

    options = (*Sampler.options, "guidance_scale")

    def __init__(self, sessions: dict[str, Any], prior: dict[str, Any]):
        super().__init__(sessions, prior)
        self.no_label = prior["classes"]

    @staticmethod
    def inputs(prior: dict[str, Any]) -> dict[str, frozenset[str]]:
        """As for `AutoregressiveSampler`."""
        return {"step": AutoregressiveSampler.inputs(prior)["step"] | {"partner", "guidance"}}

    def rows(self, labels: np.ndarray, options: dict[str, Any]) -> int:
        """Two with guidance, unless there is nothing to guide to."""
        return 1 if options["guidance_scale"] == 1 or (labels == self.no_label).all() else 2

    def _write_options(self, binding: Any, request: Request) -> None:
        super()._write_options(binding, request)
        batch, rows = len(request.labels), np.arange(len(binding.inputs["label"]))
        binding.inputs["label"][batch:] = self.no_label
        binding.inputs["partner"][:] = np.where(rows < batch, (rows + batch) % len(rows), rows)
        binding.inputs["guidance"][:] = request.options["guidance_scale"]  # of no effect on its own partner


def _bound(session: Any, batch: int) -> tuple[dict[str, Any], Any]:
    """What calls leave for the next ones, and a binding for one position."""
    dims = {"batch": batch, "length": 1}
    past = (info.name for info in session.stage.inputs if info.name.startswith("past_"))
    held = session.buffers(dims, "codes", "next_codes", *past)
    return held, session.bind(dims, held)


def carry(source: Any, target: Any) -> None:
    """Takes what an engine call leaves for the next, apart from caches that are updated in place, to its inputs."""
    for name in source.outputs:
        if name.startswith("present_"):
            target.inputs[name.replace("present_", "past_", 1)][:] = source.outputs[name]
