"""The precisions of a graph: how weights are stored, what is computed in, and how far results may be off.

Images, codes and inputs of a request, noise included, have the same types in every precision. Decisions are always in
fp32: the search of codebooks and the sampling.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from vqdeploy.errors import VqdeployError

MIXED = "mixed"
"""The precision of a package whose stages were given different ones."""


@dataclass(frozen=True)
class Limits:
    """Limits of deviations from PyTorch in fp32. `docs/precision.md` has what was measured.

    Attributes:
        codes: Share of codes of an encoder that differ.
        distance: Excess over the smallest distance, relative to the largest distance.
        logits: Largest difference of logits or hidden states, relative to the largest.
        mean_logits: Mean difference, likewise.
        likeliest: Share of positions whose likeliest code differs, close calls included.
        clear: The same share among positions whose two likeliest codes are more than four mean differences apart.
        divergence: Mean Kullback-Leibler divergence of the distributions of codes, in nats.
        variation: Mean total variation distance of the distributions of codes.
        grey_levels: Largest difference of a pixel.
        psnr: PSNR of the worst image, in dB.
        largest: Largest finite number.
    """

    codes: float
    distance: float
    logits: float
    mean_logits: float
    likeliest: float
    clear: float
    divergence: float
    variation: float
    grey_levels: int
    psnr: float = 0.0
    largest: float = math.inf


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        floats: Type of weights and states, and of the arithmetic: `fp32` or `fp16`.
        limits: How far results may be off.
        bits: Bits of the weights of matrix products, if they are integers.
    """

    floats: str
    limits: Limits
    bits: int | None = None


_FP32 = Limits(
    codes=0.01,
    distance=1e-4,
    logits=1e-4,
    mean_logits=1e-5,
    likeliest=0.01,
    clear=1e-3,
    divergence=1e-6,
    variation=1e-4,
    grey_levels=1,
)
_FP16 = Limits(
    codes=0.05,
    distance=2e-3,
    logits=1e-2,
    mean_logits=1e-3,
    likeliest=0.03,
    clear=5e-3,
    divergence=1e-4,
    variation=5e-3,
    grey_levels=8,
    psnr=50.0,
    largest=65504.0,
)
_INT8 = replace(
    _FP32,
    logits=0.1,
    mean_logits=0.03,
    likeliest=0.3,
    clear=5e-3,
    divergence=5e-4,
    variation=2e-2,
    grey_levels=64,
    psnr=35.0,
)
_INT4 = replace(_INT8, logits=0.3, mean_logits=0.05, likeliest=0.5, clear=0.05, divergence=8e-3, variation=6e-2)

PRECISIONS = {
    "fp32": Precision("fp32", _FP32),
    "fp16": Precision("fp16", _FP16),
    "int8": Precision("fp32", _INT8, bits=8),
    "int4": Precision("fp32", _INT4, bits=4),
}
"""Name -> precision."""


@dataclass(frozen=True)
class Choice:
    """The precisions that a user chose.

    Attributes:
        rest: The precision of the stages that are not named.
        named: Stage -> precision.
        caches: The precision of the KV caches, `int8`, or none of their own.
    """

    rest: str
    named: dict[str, str]
    caches: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a precision, `STAGE=PRECISION`, or several of these with commas; without a precision alone it is fp32.

        `caches=int8` is about KV caches.

        Raises:
            VqdeployError: There is no such precision, or a stage is given two.
        """
        named: dict[str, str] = {}
        for part in text.split(","):
            stage, equals, precision = part.strip().rpartition("=")
            if precision not in PRECISIONS:
                why = ", which ONNX Runtime has no kernels for on the CPU" if precision == "bf16" else ""
                found = repr(precision) + why
                raise VqdeployError("unsupported precision", expected=" or ".join(PRECISIONS), found=found)
            if equals and not stage:
                raise VqdeployError("a precision has no stage before its =", expected="STAGE=PRECISION", found=text)
            if stage in named:
                raise VqdeployError(f"{stage or 'the rest'} is given two precisions", found=text)
            named[stage] = precision
        caches = named.pop("caches", None)
        if caches not in (None, "int8"):
            raise VqdeployError("KV caches have the type of their stage, or int8", expected="caches=int8", found=text)
        return cls(named.pop("", "fp32"), named, caches)

    def of_tokenizer(self, stage: str) -> str:
        """The precision of a stage of a tokenizer, fp32 if the chosen one is for products of a prior."""
        return self.named.get(stage, "fp32" if PRECISIONS[self.rest].bits else self.rest)

    def of_prior(self, stage: str, has_products: bool) -> str:
        """The precision of a stage of a prior, fp32 if the chosen one is for products and it has none."""
        return self.named.get(stage, "fp32" if PRECISIONS[self.rest].bits and not has_products else self.rest)

    def check(self, tokenizer: Sequence[str], prior: Mapping[str, bool]) -> None:
        """Checks the choice against the names of the stages, those of the prior with whether they have products.

        Raises:
            VqdeployError: There is no such stage, or none for the precision without a name, or stages that exchange
                states differ in the type of these.
        """
        stages = [*tokenizer, *prior]
        if PRECISIONS[self.of_tokenizer("encode")].bits:
            fix = f"leave out encode={self.named['encode']}"
            raise VqdeployError("an encoder whose weights are integers finds other codes", fix=fix)
        for name in self.named:
            if name not in stages:
                raise VqdeployError(f"there is no stage {name!r} to export", expected=" or ".join(stages))
        if not prior and PRECISIONS[self.rest].bits:
            raise VqdeployError(
                f"{self.rest} is for the products of a prior, and there is none", fix="--dtype decode=int8"
            )
        floats = {PRECISIONS[self.of_prior(name, has)].floats for name, has in prior.items()}
        if len(floats) > 1:
            raise VqdeployError(
                "the stages of a prior exchange states of one type",
                expected=" or ".join(sorted(floats)),
                found=" and ".join(f"{name}={self.of_prior(name, has)}" for name, has in prior.items()),
            )


def together(precisions: Sequence[str]) -> str:
    """The precision of a package with these of its stages."""
    quantized = [name for name in precisions if PRECISIONS[name].bits]
    others = set(precisions) - set(quantized)
    if quantized and others <= {"fp32"}:
        return min(quantized, key=lambda name: PRECISIONS[name].bits or 0)  # what needs 8 bits is in int8 in int4, too
    return precisions[0] if len(set(precisions)) == 1 else MIXED
