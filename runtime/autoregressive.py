"""Autoregressive sampling with KV caches: one engine call per position."""

from collections.abc import Mapping

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.condition import Condition
from vqdeploy.runtime.interface import Tensors, floats, sampling_options, whole
from vqdeploy.runtime.manifest import SamplingInfo, TokenizerInfo
from vqdeploy.runtime.sampler import Item, Sampler, carried, write_options
from vqdeploy.runtime.session import Binding, Session


def _images(sampling: SamplingInfo) -> str:
    """The first dimension of what a call has once for each image."""
    return "batch" if sampling.no_label is None else "images"


class AutoregressiveSampler(Sampler):
    """Runs the stage `step` of an autoregressive prior.

    The entries of the prior are its condition, then the codes of each position. The prefill of an image writes the keys
    and values of all entries before the first call: of a text but its last token, and of known codes at the start.

    With guidance a slot takes two batch rows, which get the same codes: `slots + slot` with the label, and
    `slots - 1 - slot` without it. So those of the first slots lie side by side, and on a CPU rows without a label leave
    a call when no image is guided any more. The graph inputs `row` and `partner` give the two rows of each image:
    guidance moves the logits away from those of the partner, which is the row itself without guidance.
    """

    def _prepare(self, sessions: Mapping[str, Session], tokenizer: TokenizerInfo) -> None:
        self._session = session = sessions["step"]
        slots = self.slots
        self._shape = self._layout.shape
        self._first_row = slots if self.guided else 0  # of the rows with a label
        self._dims = dims = {"batch": self._first_row + slots, "images": slots, "length": 1}
        self._past = [info.name for info in session.stage.inputs if info.name.startswith("past_")]
        self._held = session.buffers(dims, "codes", "next_codes", *self._past)
        self._binding = session.bind(dims, self._held)
        height, width, self._depth = self._shape
        self._positions = height * width
        self._before = np.zeros(slots, np.int64)  # entries before the one that the first position is drawn after
        # Indexed by engine call: one copy stores the codes of all slots, whatever the position of each.
        self._drawn = session.array(np.zeros((self._positions, slots, self._depth), np.int64))
        self._known = session.array(np.zeros((slots, self._positions, self._depth), np.int64))
        self._calls = 0
        self._first = np.zeros(slots, np.int64)  # first position to draw
        self._next = np.full(slots, self._positions)  # next position to draw
        self._since = np.zeros(slots, np.int64)  # number of calls before the first position was drawn
        self._fixed: dict[int, frozenset[int]] = {}  # known positions after the first one to draw
        self._greedy: dict[int, np.ndarray] = {}
        self._used: set[int] = set()
        self._finished: dict[int, np.ndarray] = {}  # `_drawn` is written anew after as many calls as positions
        # The last prefill of a text, and of none in its place: what was prefilled, and the binding with the results.
        self._kept: dict[int | None, tuple[tuple[int, bytes], Binding]] = {}

    @classmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """The graph inputs that the sampler writes, by stage."""
        depth, rows = tokenizer.maps[0][2], _images(sampling)
        entry = {"codes": whole("length", depth), **Condition.of(sampling).inputs, "position": whole()}
        pairs = {"row": whole(rows=rows), "partner": whole(rows=rows), "guidance": floats(rows=rows)}
        noise = {"noise": floats(depth, tokenizer.codebook_size, rows=rows)}
        guidance = {} if sampling.no_label is None else pairs
        return {"step": entry | guidance | noise | sampling_options(depth, rows=rows)}

    @classmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage."""
        return {"step": {"next_codes": whole(tokenizer.maps[0][2], rows=_images(sampling))}}

    @classmethod
    def rows(cls, guided: bool) -> int:
        """Batch rows per slot."""
        return 2 if guided else 1

    def _left_of(self, slot: int) -> int:
        """Engine calls until the image of a slot is done."""
        return int(self._positions - self._next[slot])

    def _codes_of(self, slot: int) -> np.ndarray:
        """Codes int64 [h, w, Q] so far, -1 where nothing is drawn yet."""
        if slot in self._finished:
            return self._finished[slot].copy()
        codes = self._items[slot].known.reshape(self._positions, -1).copy()
        first, until = self._first[slot], self._next[slot]
        if first < until:
            calls = (self._since[slot] + np.arange(until - first)) % self._positions
            drawn = self._read("step", self._drawn)[calls, slot]
            codes[first:until] = np.where(codes[first:until] < 0, drawn, codes[first:until])
        return codes.reshape(self._shape)

    def _admit(self, slot: int, item: Item) -> None:
        known = item.known.reshape(self._positions, -1)
        unknown = known[:, 0] < 0
        if np.any((known < 0) != unknown[:, None]):
            raise VqdeployError("a position is only partly known", expected="all of its codes, or -1 for each")
        first = int(unknown.argmax()) if unknown.any() else self._positions
        self._finished.pop(slot, None)
        self._first[slot] = self._next[slot] = first
        if first == self._positions:
            return
        self._since[slot] = self._calls
        self._known[slot] = known
        self._fixed[slot] = frozenset((first + np.flatnonzero(~unknown[first:])).tolist())
        self._greedy[slot] = self._write_options(self._binding, slot, item)
        self._before[slot] = before = self.condition.entries(item.condition) - 1
        own, *partner = self._rows_of(slot)
        rows: dict[int, int | None] = {own: None, **dict.fromkeys(partner, self.no_label)}
        for row, none in rows.items():
            self.condition.write(self._binding.inputs, row, item.condition, none)
            if none is None or self._guides_at(item, first):
                self._clear(row)
                if before + first > 0:
                    self._prefill(row, item, none, before, known[:first])

    def _rows_of(self, slot: int) -> list[int]:
        """The batch rows of a slot: with its condition, and with guidance also without."""
        first = self._first_row
        return [first + slot, first - 1 - slot] if self.guided else [slot]

    def _guides_at(self, item: Item, position: int) -> bool:
        """Whether the codes of a position are drawn with guidance."""
        last = item.options.get("guidance_interval", -1)
        return self.guides(item) and (last < 0 or position <= last + 1)

    def _write_options(self, binding: Binding, image: int, item: Item) -> np.ndarray:
        """Writes the options of an image, which stay the same for all its steps; see `write_options`."""
        inputs = binding.inputs
        if "guidance" in inputs:
            inputs["guidance"][image] = item.options["guidance_scale"]
        return write_options(item.options, inputs, image, self._depth, inputs["noise"].shape[-1])

    def _clear(self, row: int) -> None:
        """Zeroes the KV cache of a row: a NaN left by an earlier image would survive masking, as 0 * NaN is NaN."""
        if row in self._used:
            for name in self._past:
                self._held[name][row] = 0
        self._used.add(row)

    def _prefill(self, row: int, item: Item, none: int | None, before: int, known: np.ndarray) -> None:
        """Prefill: one call for the condition and a known prefix [S, Q], on the cache row of the slot."""
        in_place = self._session.stage.aliases.values()
        if len(known):
            dims = {"batch": 1, "images": 1, "length": before + len(known)}
            binding = self._session.bind(dims, {name: self._held[name][row : row + 1] for name in in_place})
            binding.inputs["codes"][0, before + 1 :] = known[:-1]
            self._begin(binding, item, none)
            states = carried(binding)
            self._held["codes"][row, 0] = known[-1]
        else:
            binding = self._text(item, none, before)
            states = {name: binding.inputs[name] for name in in_place} | carried(binding)
        for name, state in states.items():
            self._held[name][row : row + 1] = state

    def _text(self, item: Item, none: int | None, before: int) -> Binding:
        """A binding with the caches of a text alone, or of none in its place.

        The last one is kept: often the next image has the same text, and what stands for none depends on nothing but
        its length. On a GPU, buffers and a context for each image would cost more than copies of the caches, and for
        each length more than entries behind a text, which those of codes replace before they are attended.
        """
        length = before if self._session.device == "cpu" else self.condition.length - 1
        key = before, b"" if none is not None else np.asarray(item.condition).tobytes()
        kept, binding = self._kept.get(none, ((0, b""), None))
        if binding is None or binding.inputs["codes"].shape[1] != length:
            binding = self._session.bind({"batch": 1, "images": 1, "length": length})
        if kept != key:
            self._begin(binding, item, none)
            self._kept[none] = key, binding
        return binding

    def _begin(self, binding: Binding, item: Item, none: int | None) -> None:
        """A call for the first entries of an image."""
        self._write_options(binding, 0, item)
        self.condition.write(binding.inputs, 0, item.condition, none)
        binding.inputs["position"][:] = 0
        self._run("step", binding)

    def _call(self) -> None:
        running, first = sorted(self._running), self._first_row
        inputs = self._binding.inputs
        positions = np.where(self._next < self._positions, self._before + self._next, 0)
        inputs["position"][first:] = positions
        if self.guided:
            inputs["position"][:first] = positions[::-1]
        draws = {slot: int(self._next[slot]) for slot in running}
        self._fill_noise(inputs["noise"], draws, self._greedy)
        guided = [slot for slot in running if self._guides_at(self._items[slot], draws[slot])]
        used = self._used_slots(self._session)
        partners = self._used_slots(self._session, guided) if self.guided else 0
        rows = slice(first - partners, first + used)
        self._used.update(range(rows.start, rows.stop))  # those of free slots and of unguided images are written too
        binding = self._part(self._session, self._binding, self._dims, batch=rows, images=slice(0, used))
        if "partner" in inputs:
            own = partners + np.arange(used)
            binding.inputs["row"][:] = own
            binding.inputs["partner"][:] = [partners - 1 - i if i in guided else own[i] for i in range(used)]
        self._run("step", binding)
        for name, state in carried(binding).items():
            binding.inputs[name][:] = state
        # On a GPU the codes stay on the device: nothing here synchronizes.
        drawn, codes = self._held["next_codes"], self._held["codes"]
        self._drawn[self._calls % self._positions] = drawn
        codes[first:, 0] = drawn
        if self.guided:
            codes[:first, 0] = drawn[::-1]
        for slot in running:
            if (position := int(self._next[slot])) in self._fixed[slot]:
                for row in self._rows_of(slot):
                    codes[row, 0] = self._known[slot, position]
            self._next[slot] += 1
        self._calls += 1
        for slot in running:
            if not self._left_of(slot):
                self._finished[slot] = self._codes_of(slot)
