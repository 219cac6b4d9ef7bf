"""Next-scale sampling: one engine call per scale, which draws all codes of its map.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (NeurIPS 2024).
"""

import math
from collections.abc import Mapping

import numpy as np

from vqdeploy.runtime.interface import Tensors, floats, whole
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.options import for_graph
from vqdeploy.runtime.sampler import Drawn, Item, Sampler, carried
from vqdeploy.runtime.session import Array, Binding, Session

_CALL_LOGITS = {"cpu": 2**20, "cuda": 2**25}  # larger batches are no faster on a CPU and need more memory


class NextScaleSampler(Sampler):
    """Runs the stage `step`, with two labels per image under guidance, and `blend` for images with `more_smooth`.

    All slots are at the same scale, so that images can join only while no slot is in use. Each scale has a binding of
    its own: its KV caches are those that the scale before left. The guidance scale rises from 1 at the first scale.
    """

    joins = "when empty"
    raster = False
    needs = (*Sampler.needs, "more_smooth")

    def _prepare(self, sessions: Mapping[str, Session], tokenizer: TokenizerInfo) -> None:
        self._session, self._sessions = sessions["step"], sessions
        self._sizes = [math.prod(each) for each in tokenizer.maps]
        self._firsts = [sum(self._sizes[:scale]) for scale in range(len(self._sizes))]
        self._bindings: list[Binding] = []  # of each scale, for as many slots as are in use
        self._blends: dict[int, Binding] = {}
        self._rows = self._scale = 0
        self._until: dict[int, int] = {}

    @classmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """The graph inputs that the sampler writes, by stage."""
        size = tokenizer.codebook_size
        draw: Tensors = {
            "given": whole("length"),
            "noise": floats("length", size),
            "temperature": floats(),
            "top_k": whole(),
            "top_p": floats(),
            "past_map": floats("cells", "code dim"),
        }
        step = {"label": whole("conditions"), "guidance": floats("conditions")}
        blend = {"logits": floats("length", size), "position": whole(), "share": floats()}
        return {
            "step": {**draw, **step},
            "blend": {**draw, **blend},
            "reconstruct": {"whole_map": floats("cells", "code dim")},
        }

    @classmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage."""
        grown = {"present_map": floats("cells", "code dim")}
        drawn = {"codes": whole("length"), "logits": floats("length", tokenizer.codebook_size)}
        return {
            "step": {**drawn, **grown},
            "blend": grown,
            "reconstruct": {"image": ("uint8", ("batch", *tokenizer.image))},
        }

    @classmethod
    def most_slots(cls, stages: Mapping[str, StageInfo], device: str) -> int:
        """Most slots of a sampler, for speed."""
        logits = next(info for info in stages["step"].inputs if info.name == "noise")
        return max(1, _CALL_LOGITS[device] // (stages["step"].dims["length"].max * int(logits.shape[2])))

    def _left_of(self, slot: int) -> int:
        """Engine calls until the image of a slot is done."""
        return max(self._until[slot] - self._scale, 0)

    def _codes_of(self, slot: int) -> np.ndarray:
        """Codes int64 [N] so far, -1 where nothing is drawn yet."""
        codes = self._items[slot].known.copy()
        for scale in range(min(self._scale, self._until[slot])):
            drawn = self._read("step", self._bindings[scale].outputs["codes"])[slot]
            own = codes[self._of(scale)]
            own[own < 0] = drawn[own < 0]
        return codes

    def _drawn_of(self, slot: int) -> Drawn:
        """What was drawn; with `more_smooth` also the sum of all scales float32 [h * w, D] of a finished image."""
        codes = self._codes_of(slot)
        if self._left_of(slot) or not self._until[slot] or not self._items[slot].options["more_smooth"]:
            return Drawn(codes)
        return Drawn(codes, self._read("step", self._bindings[-1].outputs["present_map"])[slot].copy())

    def release(self, slot: int) -> None:
        """Frees a slot; its image need not be done."""
        super().release(slot)
        if not self._items:
            self._scale = 0

    def _of(self, scale: int) -> slice:
        """The codes of a scale."""
        return slice(self._firsts[scale], self._firsts[scale] + self._sizes[scale])

    def _admit(self, slot: int, item: Item) -> None:
        unknown = np.flatnonzero(item.known < 0)
        if unknown.size == 0:
            self._until[slot] = 0
        elif item.options["more_smooth"]:
            self._until[slot] = len(self._sizes)  # the sum of all scales is what is decoded
            self._blend = self._sessions["blend"]  # opened now: a closed pipeline opens no more
        else:
            self._until[slot] = int(np.searchsorted(self._firsts, unknown[-1], "right"))

    def _call(self) -> None:
        if self._scale == 0:
            self._bind()
        scale, binding, share = self._scale, self._bindings[self._scale], self._share
        greedy = {slot: self._write(slot, binding.inputs, share) for slot in sorted(self._running)}
        self._fill_noise(binding.inputs["noise"], dict.fromkeys(greedy, scale), greedy)
        self._run("step", binding)
        if smooth := [slot for slot in greedy if self._items[slot].options["more_smooth"]]:
            self._smoothen(smooth, binding, share)
        self._scale += 1

    @property
    def _share(self) -> float:
        """How far the scales have come, 0 at the first and 1 at the last."""
        return self._scale / max(len(self._sizes) - 1, 1)

    def _bind(self) -> None:
        """Makes the bindings of all scales, unless they are there for as many slots."""
        rows = self._used_slots(self._session)
        if rows != self._rows:
            self._rows, self._bindings, self._blends = rows, [], {}
            states: dict[str, Array] = {}
            for size, first in zip(self._sizes, self._firsts, strict=True):
                dims = {"batch": rows, "conditions": 2 if self.guided else 1}
                dims |= {"length": size, "past": first, "total": first + size}
                self._bindings.append(self._session.bind(dims, states))
                states = carried(self._bindings[-1])
        for binding in self._bindings:
            for name in ("temperature", "top_k", "top_p"):
                binding.inputs[name][:] = 1  # for free slots
        self._bindings[0].inputs["past_map"][:] = 0

    def _write(self, slot: int, inputs: Mapping[str, Array], share: float) -> np.ndarray:
        """Writes the inputs of a slot; tells for each code, bool [S], whether the most likely one is taken."""
        item, scale = self._items[slot], self._scale
        known = item.known[self._of(scale)]
        inputs["given"][slot] = np.where(known < 0, self._size, known)
        change = (item.options["guidance_scale"] - 1) * share if self.guides(item) else 0.0
        # A label of weight 0 changes no logit.
        inputs["label"][slot] = item.condition if self.no_label is None else self.no_label
        inputs["label"][slot, 0] = item.condition
        inputs["guidance"][slot] = -change
        inputs["guidance"][slot, 0] = 1 + change
        options = for_graph(item.options, len(self._sizes), self._size)
        for name, values in options.items():
            inputs[name][slot] = values[scale]
        return np.full(len(known), options["top_k"][scale] == 1)

    def _smoothen(self, slots: list[int], step: Binding, share: float) -> None:
        """Replaces what this scale added to the maps of some slots by its blended vectors."""
        if self._scale not in self._blends:
            dims = {"batch": self._rows, "length": self._sizes[self._scale]}
            held = {"logits": step.outputs["logits"]}
            if self._scale:
                held["past_map"] = self._bindings[self._scale - 1].outputs["present_map"]
            self._blends[self._scale] = self._blend.bind(dims, held)
        binding = self._blends[self._scale]
        for name in ("given", "noise", "temperature", "top_k", "top_p"):
            binding.inputs[name][:] = step.inputs[name]
        binding.inputs["position"][:] = self._firsts[self._scale]
        binding.inputs["share"][:] = share
        self._run("blend", binding)
        self.last = step
        for slot in slots:
            step.outputs["present_map"][slot] = binding.outputs["present_map"][slot]
