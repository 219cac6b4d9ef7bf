"""The sampling options: one table, from which the checks, the command line and the README's table follow."""

import math
from dataclasses import dataclass

_STRONGEST = 1e6  # far from where confidence in known codes or fp32 ends


@dataclass(frozen=True)
class SamplingOption:
    """What may be asked of a sampler.

    Args:
        name: As in Python and in manifests; `guidance_scale`.
        type: `int`, `float` or `str`.
        help: One sentence.
        low: Smallest value.
        high: Largest value; infinity for any finite one, None for the size of the codebook.
        per_depth: Whether it takes one value, or one for each depth or level.
        choices: The values of a `str`.
        aliases: Spellings on the command line beside the name's.
    """

    name: str
    type: type[int] | type[float] | type[str]
    help: str
    low: float = 0
    high: float | None = math.inf
    per_depth: bool = False
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        """On the command line, the usual one first."""
        return ("--" + self.name.replace("_", "-"), *self.aliases)

    @property
    def values(self) -> str:
        """The values that it takes, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.high is None:
            return f"{self.low:g}..codebook size"
        return f"{self.low:g}..{self.high:.0f}" if math.isfinite(self.high) else f"{self.low:g} or more"


SAMPLING_OPTIONS = (
    SamplingOption("temperature", float, "Divides the logits; 0 takes the likeliest code.", per_depth=True),
    SamplingOption("top_k", int, "Keeps the k likeliest codes; 0 keeps all.", high=None, per_depth=True),
    SamplingOption("top_p", float, "Keeps the likeliest codes up to this probability.", high=1, per_depth=True),
    SamplingOption("guidance_scale", float, "Pull to the label; 1 is none.", high=_STRONGEST, aliases=("--cfg-scale",)),
    SamplingOption(
        "steps", int, "Engine calls of a masked prior.", low=1, high=10_000, aliases=("--num-inference-steps",)
    ),
    SamplingOption(
        "schedule",
        str,
        "How many codes a masked prior leaves masked after each step.",
        choices=("cosine", "linear", "square", "cubic", "exp", "log", "arccos", "halton"),
    ),
    SamplingOption(
        "choice_temperature", float, "Noise on the confidence by which a masked prior keeps codes.", high=_STRONGEST
    ),
)
