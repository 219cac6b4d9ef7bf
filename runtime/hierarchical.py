"""Sampling of a hierarchy of code maps, top level first: one engine call per row and one per position."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vqdeploy.runtime.interface import Expected, Tensors, floats, sampling_options, whole
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo, level_names
from vqdeploy.runtime.options import for_graph
from vqdeploy.runtime.sampler import Item, Sampler, Spent, carried
from vqdeploy.runtime.session import Array, Binding, Session

_FROM_ROW = ("entry", "inner", "gates")


class HierarchicalSampler(Sampler):
    """Runs the stages `LEVEL_row`, `LEVEL_pixel` and, if codes condition it, `LEVEL_condition` of each level.

    All slots visit the positions together, so that images can join only while no slot is in use. A level whose codes
    are all known is skipped. Options may differ between levels.
    """

    joins = "when empty"

    def _prepare(self, sessions: Mapping[str, Session], tokenizer: TokenizerInfo) -> None:
        names = level_names(len(tokenizer.maps))
        grids = [each[:2] for each in tokenizer.maps]
        self._levels = [_Level(n, sessions, grid, self.spent) for n, grid in zip(names, grids, strict=True)]
        self._maps: list[Array] = []
        self._walk: Iterator[None] = iter(())
        self._left = 0

    @classmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """The graph inputs that the sampler writes, by stage."""
        stages: dict[str, Tensors] = {}
        above: tuple[int, ...] = ()
        for name, (height, width, _) in zip(level_names(len(tokenizer.maps)), tokenizer.maps, strict=True):
            row: dict[str, Expected] = {"codes": whole(f"{name} side", width), "row": whole()}
            row |= {tensor: f"{name} {tensor}" for tensor in ("row_x", "row_y")}
            row |= {f"above_{axis}.0": f"{name} spread_{axis}" for axis in "xy"}
            if above:
                row |= {"label": whole(), "condition": f"{name} condition"}
                stages[f"{name}_condition"] = {"codes": whole(*above)}
            stages[f"{name}_row"] = row
            pixel: dict[str, Expected] = {"codes": whole(f"{name} side"), "row": whole(), "column": whole()}
            pixel |= {tensor: f"{name} {tensor}" for tensor in _FROM_ROW}
            pixel |= {f"past_{tensor}": f"{name} {tensor}" for tensor in ("row_x", "row_y", "left_x", "left_y")}
            stages[f"{name}_pixel"] = pixel | {"noise": floats(1, tokenizer.codebook_size)} | sampling_options(1)
            above = height, width
        return stages

    @classmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage."""
        stages: dict[str, Tensors] = {}
        for name in level_names(len(tokenizer.maps)):
            stages[f"{name}_condition"] = {"condition": f"{name} condition"}
            stages[f"{name}_row"] = {tensor: f"{name} {tensor}" for tensor in (*_FROM_ROW, "spread_x", "spread_y")}
            stages[f"{name}_pixel"] = {"next_codes": whole(1)}
        return stages

    @classmethod
    def most_slots(cls, stages: Mapping[str, StageInfo], device: str) -> int:
        """Most slots of a sampler: each has KV caches of about 100 MB at published sizes."""
        return 16

    def _left_of(self, slot: int) -> int:
        """Engine calls per position until the images are done; calls per row are not counted."""
        return self._left

    def _codes_of(self, slot: int) -> np.ndarray:
        """Codes int64 [N] so far, -1 where nothing is drawn yet."""
        maps = self._layout.split(self._items[slot].known[None])
        for index, (level, codes) in enumerate(self._running_levels() if self._maps else ()):
            if (maps[index] < 0).any():
                maps[index] = self._read(f"{level.name}_pixel", codes)[slot : slot + 1]
        codes_of_slot: np.ndarray = self._layout.join(maps)[0]
        return codes_of_slot

    def _running_levels(self) -> Iterator[tuple["_Level", Array]]:
        return zip(self._levels, self._maps, strict=True)

    def _admit(self, slot: int, item: Item) -> None:
        self._maps = []
        self._left = self._calls([*self._items.values(), item])

    def _calls(self, items: Sequence[Item]) -> int:
        """Calls for the images together: one per position of each level that one of them has to draw."""
        known = self._layout.split(np.stack([item.known for item in items]))
        return sum(math.prod(part.shape[1:]) for part in known if (part < 0).any())

    def release(self, slot: int) -> None:
        """Frees a slot; its image need not be done."""
        super().release(slot)
        if not self._items:
            self._maps, self._walk, self._left = [], iter(()), 0
        elif not self._maps:  # it left before the first call
            self._left = self._calls(list(self._items.values()))

    def _call(self) -> None:
        if not self._maps:
            self._begin()
        next(self._walk)
        self._left -= 1

    def _begin(self) -> None:
        known = np.full((self._used_slots(self._levels[0].pixel), *self._layout.shape), 0)
        for slot in self._running:
            known[slot] = self._items[slot].known
        parts = [part[..., 0] for part in self._layout.split(known)]
        # On a GPU these stay on the device: the loop never waits for a code.
        self._maps, given = ([level.array(p) for level, p in zip(self._levels, parts, strict=True)] for _ in range(2))
        self._walk = self._all_positions(parts, given)

    def _all_positions(self, known: list[np.ndarray], given: list[Array]) -> Iterator[None]:
        """Draws the unknown codes of all levels, one position after the other; yields at each."""
        first = 0
        for index, (level, codes) in enumerate(self._running_levels()):
            unknown = known[index] < 0
            if unknown.any():
                above = self._maps[index - 1] if index else None
                for row, column, binding in level.positions(codes, above, *self._of_level(index)):
                    position = first + row * level.grid[1] + column
                    self._fill_noise(binding.inputs["noise"], dict.fromkeys(self._running, position), level.greedy)
                    self._run(f"{level.name}_pixel", binding)
                    codes[:, row, column] = binding.outputs["next_codes"][:, 0]
                    for slot in np.flatnonzero(~unknown[:, row, column]):
                        codes[slot, row, column] = given[index][slot, row, column]
                    yield
            first += math.prod(level.grid)

    def _of_level(self, index: int) -> tuple[dict[int, int], dict[int, dict[str, Any]]]:
        """The label of each slot that runs, and its options at a level in the form of the graph inputs."""
        labels, options = {}, {}
        for slot in self._running:
            item = self._items[slot]
            labels[slot] = int(item.condition)
            choices = for_graph(item.options, len(self._levels), self._size)
            options[slot] = {name: values[index] for name, values in choices.items()}
        return labels, options


class _Buffers(NamedTuple):
    """Bindings of the stages of a level for a number of slots, which share buffers, and its codes with padding."""

    slots: int
    condition: Binding | None
    rows: list[Binding]
    pixel: Binding
    padded: Array


class _Level:
    """The stages of one level; `greedy` tells for each slot whether it takes the most likely code."""

    def __init__(self, name: str, sessions: Mapping[str, Session], grid: tuple[int, ...], spent: dict[str, Spent]):
        self.name, self.grid, self._spent = name, grid, spent
        self.pixel, self._row = sessions[f"{name}_pixel"], sessions[f"{name}_row"]
        self._condition = sessions.get(f"{name}_condition")
        self._buffers: _Buffers | None = None
        self.greedy: dict[int, np.ndarray] = {}

    def array(self, codes: np.ndarray) -> Array:
        """A copy of codes on the device of the engine, to read without a wait."""
        return self.pixel.array(codes)

    def positions(
        self, codes: Array, above: Array | None, labels: dict[int, int], options: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[int, int, Binding]]:
        """Yields row, column and binding of each position in raster order, with all inputs but the noise written.

        The caller runs the binding and writes the codes of the position into `codes` [B, h, w] before it goes on.
        `above` are the codes of the level above [B, h / 2, w / 2] or None; `labels` and `options` are those of slots.
        """
        height, width = self.grid
        if self._buffers is None or self._buffers.slots != len(codes):
            self._buffers = self._bound(len(codes))
        _, condition, rows, pixel, padded = self._buffers
        for binding in (pixel, *rows):
            binding.clear()
        self._write(options, pixel)
        if condition is not None and above is not None:
            condition.inputs["codes"][:] = above
            self._run("condition", condition)
        side = pixel.inputs["codes"].shape[1]
        padded[...] = -1
        for row in range(height):
            binding = rows[row % len(rows)]
            binding.inputs["row"][:] = pixel.inputs["row"][:] = row
            binding.inputs["codes"][:] = padded[:, row : row + side, side:]
            for slot, label in labels.items() if "label" in binding.inputs else ():
                binding.inputs["label"][slot] = label
            self._run("row", binding)
            for name in ("past_left_x", "past_left_y"):
                pixel.inputs[name][:] = 0
            for column in range(width):
                pixel.inputs["column"][:] = column
                pixel.inputs["codes"][:] = padded[:, side + row, column : side + column]
                yield row, column, pixel
                padded[:, side + row, side + column] = codes[:, row, column]
                for name, state in carried(pixel).items():
                    pixel.inputs[name][:] = state

    def _write(self, options: dict[int, dict[str, Any]], pixel: Binding) -> None:
        for name in ("temperature", "top_k", "top_p"):
            pixel.inputs[name][:] = 1  # for free slots
        for slot, values in options.items():
            for name, value in values.items():
                pixel.inputs[name][slot] = value
            self.greedy[slot] = np.array([values["top_k"] == 1])

    def _run(self, part: str, binding: Binding) -> None:
        self._spent[f"{self.name}_{part}"].run(binding)

    def _bound(self, slots: int) -> _Buffers:
        dims = {"batch": slots}
        past = (info.name for info in self.pixel.stage.inputs if info.name.startswith("past_"))
        held = self.pixel.buffers(dims, "codes", *past, *_FROM_ROW)
        shared = {name: held[name] for name in _FROM_ROW}
        shared |= {name: held[f"past_{name}"] for name in ("row_x", "row_y")}
        above = None
        if self._condition is not None:
            made = self._condition.buffers(dims, "codes", "condition")
            above = self._condition.bind(dims, made)
            shared["condition"] = made["condition"]
        pixel, side = self.pixel.bind(dims, held), held["codes"].shape[1]
        padded = self.pixel.array(np.full((slots, self.grid[0] + side, side + self.grid[1]), -1))
        return _Buffers(slots, above, _bound_rows(self._row, dims, shared), pixel, padded)


def _bound_rows(row: Session, dims: dict[str, int], shared: Mapping[str, Array]) -> list[Binding]:
    """Bindings of `row`, one for each row above that it sees.

    The buffers of those rows form a ring: from call to call they change roles, and the new row overwrites the farthest.
    """
    seen = 1 + sum(info.name.startswith("above_x.") for info in row.stage.inputs)
    window = row.buffers(dims, "codes")
    spread = [row.buffers(dims, "spread_x", "spread_y") for _ in range(seen)]
    slots = {axis: [made[f"spread_{axis}"] for made in spread] for axis in "xy"}
    rows = []
    for turn in range(seen):
        roles: dict[str, Array] = {}
        for axis, buffers in slots.items():
            *above, roles[f"spread_{axis}"] = buffers[turn:] + buffers[:turn]
            roles |= {f"above_{axis}.{i}": buffer for i, buffer in enumerate(above)}
        rows.append(row.bind(dims, {**shared, **roles, **window}))
    return rows
