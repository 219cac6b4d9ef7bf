"""Sampling of a hierarchy of code maps, top first: one engine call a row and one a place in each level."""

import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from vqdeploy.runtime.autoregressive import carry
from vqdeploy.runtime.kept import kept
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.options import for_graph
from vqdeploy.runtime.request import Callback, Request, Sampler, cells_of, still_where_greedy

_FROM_ROW = ("entry", "inner", "gates")
_PIXEL_INPUTS = frozenset(("codes", "row", "column", "noise", "temperature", "top_k", "top_p", *_FROM_ROW)) | frozenset(
    ("past_left_x", "past_left_y", "past_row_x", "past_row_y")
)
_ROW_INPUTS = frozenset(("row", "codes", "row_x", "row_y", "above_x.0", "above_y.0"))


class Level:
    """The stages of one level: `NAME_row`, `NAME_pixel` and, if codes condition it, `NAME_condition`."""

    def __init__(self, name: str, sessions: dict[str, Any], grid: tuple[int, int]):
        self.name, self.grid = name, grid
        self._pixel = pixel = sessions[f"{name}_pixel"]
        stages = sessions.get(f"{name}_condition"), sessions[f"{name}_row"], pixel
        self._bound = kept(partial(_bound, *stages, grid), pixel.device)
        self.codebook_size = next(info for info in pixel.stage.inputs if info.name == "noise").shape[-1]
        self.seconds: dict[str, float] = defaultdict(float)

    def places(
        self, codes: Any, labels: np.ndarray, above: Any, options: dict[str, Any]
    ) -> Iterator[tuple[int, int, Any]]:
        """Row, column and the buffers of each place, in raster order, when all but the noise is written there.

        Who takes them calls `run`, and writes the codes of the place into `codes` [B, h, w] before the next.
        `above` are the codes of the level above [B, h / 2, w / 2] or None, `options` those of the sampler as the graph
        takes them. Codes may be those of the host or `array` of them.
        """
        (height, width), batch = self.grid, len(codes)
        condition, rows, pixel, padded = self._bound(batch)
        for binding in (pixel, *rows):
            binding.clear()
        for name, value in options.items():
            pixel.inputs[name][:] = value
        if condition is not None:
            condition.inputs["codes"][:] = above
            self.run("condition", condition)
        side = pixel.inputs["codes"].shape[1]
        padded[...] = -1
        for row in range(height):
            binding = rows[row % len(rows)]
            binding.inputs["row"][:] = pixel.inputs["row"][:] = row
            binding.inputs["codes"][:] = padded[:, row : row + side, side:]
            if "label" in binding.inputs:
                binding.inputs["label"][:] = labels
            self.run("row", binding)
            for name in ("past_left_x", "past_left_y"):
                pixel.inputs[name][:] = 0
            for column in range(width):
                pixel.inputs["column"][:] = column
                pixel.inputs["codes"][:] = padded[:, side + row, column : side + column]
                yield row, column, pixel
                padded[:, side + row, side + column] = codes[:, row, column]
                carry(pixel, pixel)

    def array(self, codes: np.ndarray) -> Any:
        """A copy of codes where the engine can take them from without a wait."""
        return self._pixel.array(codes)

    def run(self, part: str, binding: Any) -> None:
        """One engine call, its time added to that of a part of the level."""
        start = time.perf_counter()
        binding.run()
        self.seconds[f"{self.name}_{part}"] += time.perf_counter() - start


class HierarchicalSampler(Sampler):
    """Runs the stages of a prior of several levels. Codes are int64 [B, N], all levels in a row.

    A level whose codes are all known is not run. Options may differ from level to level.
    """

    call_images = 16  # each has caches of some 100 MB at published sizes

    def __init__(self, sessions: dict[str, Any], prior: dict[str, Any]):
        super().__init__()
        grids = [tuple(level["grid"]) for level in prior["levels"]]
        names = level_names(len(grids))
        self.levels = [Level(name, sessions, grid) for name, grid in zip(names, grids, strict=True)]

    @staticmethod
    def inputs(prior: dict[str, Any]) -> dict[str, frozenset[str]]:
        """What the sampler writes to, stage by stage."""
        names = level_names(len(prior["levels"]))
        conditions = {f"{n}_condition": frozenset(("codes",)) for n in names[1:]}
        rows = {f"{n}_row": _ROW_INPUTS | {"label", "condition"} for n in names[1:]}
        return conditions | {"top_row": _ROW_INPUTS} | rows | {f"{n}_pixel": _PIXEL_INPUTS for n in names}

    def __call__(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """Codes int64 [B, N]: the known ones, and samples elsewhere."""
        self.seconds.clear()
        parts = self._maps(request.known)
        # On a GPU these stay there: nothing in the loop waits for a code.
        maps, given = ([level.array(part) for level, part in zip(self.levels, parts, strict=True)] for _ in range(2))
        open_levels = [index for index, part in enumerate(parts) if (part < 0).any()]
        total = sum(parts[index][0].size for index in open_levels)
        step = 0
        for index in open_levels:
            self.levels[index].seconds.clear()
            for _ in self._places(index, parts[index] < 0, given[index], maps, request):
                step += 1
                if callback:
                    callback(step, total, _joined(maps))
            self.seconds |= self.levels[index].seconds
        last = next(reversed(self.seconds), None)  # on a GPU the wait for all that was queued
        return _joined([self.read(last, codes) for codes in maps] if last else parts)

    def _maps(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes of all levels in a row [B, N] as the map of each [B, h, w]."""
        counts = [height * width for height, width in (level.grid for level in self.levels)]
        parts = np.split(codes, np.cumsum(counts)[:-1], 1)
        return [part.reshape(-1, *level.grid) for part, level in zip(parts, self.levels, strict=True)]

    def _places(self, index: int, unknown: np.ndarray, given: Any, maps: list[Any], request: Request) -> Iterator[None]:
        """Draws the unknown codes of a level into its map, one place after the other."""
        level, codes, above = self.levels[index], maps[index], maps[index - 1] if index else None
        first = sum(codes.shape[1] * codes.shape[2] for codes in maps[:index])
        choices = for_graph(request.options, len(self.levels), level.codebook_size)
        options = {name: values[index] for name, values in choices.items()}
        for row, column, binding in level.places(codes, request.labels, above, options):
            gumbel(request.seed, request.images, first + row * level.grid[1] + column, binding.inputs["noise"])
            still_where_greedy(binding.inputs)
            level.run("pixel", binding)
            codes[:, row, column] = binding.outputs["next_codes"][:, 0]
            for image in np.flatnonzero(~unknown[:, row, column]):
                codes[image, row, column] = given[image, row, column]
            yield

    def unknown(self, mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
        """The codes to draw [B, N], where pixels are unknown [B, H, W]: in each level from the first such row on."""
        rows = (np.maximum.accumulate(cells_of(mask, *level.grid).any(2), 1) for level in self.levels)
        return self._whole_rows(rows)

    def unknown_share(self, ratio: float, grid: tuple[int, ...], images: np.ndarray, seed: int) -> np.ndarray:
        """A share of the codes of each image [B, N], in each level the rows at the bottom."""
        heights = (level.grid[0] for level in self.levels)
        rows = (np.arange(height) >= int(height * (1 - ratio) + 1e-9) for height in heights)
        return self._whole_rows(np.broadcast_to(row, (len(images), len(row))) for row in rows)

    def _whole_rows(self, rows: Any) -> np.ndarray:
        widths = (level.grid[1] for level in self.levels)
        return np.concatenate([np.repeat(row, width, 1) for row, width in zip(rows, widths, strict=True)], 1)


def _bound(condition: Any, row: Any, pixel: Any, grid: tuple[int, int], batch: int) -> tuple[Any, list[Any], Any, Any]:
    """Bindings of the stages of a level, which share what one leaves for the other; its codes within margins."""
    dims = {"batch": batch}
    past = (info.name for info in pixel.stage.inputs if info.name.startswith("past_"))
    held = pixel.buffers(dims, "codes", *past, *_FROM_ROW)
    shared = {name: held[name] for name in _FROM_ROW}
    shared |= {name: held[f"past_{name}"] for name in ("row_x", "row_y")}
    above = None
    if condition is not None:
        made = condition.buffers(dims, "codes", "condition")
        above = condition.bind(dims, made)
        shared["condition"] = made["condition"]
    place, side = pixel.bind(dims, held), held["codes"].shape[1]
    padded = pixel.array(np.full((batch, grid[0] + side, side + grid[1]), -1))
    return above, _bound_rows(row, dims, shared), place, padded


def _bound_rows(row: Any, dims: dict[str, int], shared: dict[str, Any]) -> list[Any]:
    """Bindings of `row`, one for each row above that it sees.

    Those rows stay where they are: from call to call their buffers change roles, and the new row goes where the
    farthest one was.
    """
    seen = 1 + sum(info.name.startswith("above_x.") for info in row.stage.inputs)
    window = row.buffers(dims, "codes")
    spread = [row.buffers(dims, "spread_x", "spread_y") for _ in range(seen)]
    slots = {axis: [made[f"spread_{axis}"] for made in spread] for axis in "xy"}
    rows = []
    for turn in range(seen):
        roles: dict[str, Any] = {}
        for axis, buffers in slots.items():
            *above, roles[f"spread_{axis}"] = buffers[turn:] + buffers[:turn]
            roles |= {f"above_{axis}.{i}": buffer for i, buffer in enumerate(above)}
        rows.append(row.bind(dims, shared | roles | window))
    return rows


def _joined(maps: list[Any]) -> np.ndarray:
    """Codes [B, N] of all levels in a row."""
    return np.concatenate([np.asarray(codes).reshape(len(codes), -1) for codes in maps], 1)


def level_names(count: int) -> list[str]:
    """Names of the levels of a hierarchy, top first."""
    return ["top", *(f"middle{i}" for i in range(1, count - 1)), "bottom"] if count > 1 else ["top"]
