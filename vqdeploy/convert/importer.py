"""`vqdeploy import`: turns published weights of any supported code base into a checkpoint folder."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqdeploy import checkpoint
from vqdeploy.config import Config
from vqdeploy.convert import (
    containers,
    diffusers,
    emu3,
    enhancing_transformers,
    llamagen,
    maskgit_jax,
    maskgit_pytorch,
    movqgan,
    rq_vae_transformer,
    taming,
    var,
    vq_vae_2,
)
from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import refuse_what_has_no_codes
from vqdeploy.convert.parts import Part
from vqdeploy.errors import ArtifactError, VqdeployError, can_be_shown
from vqdeploy.files import check_outside, check_regular, read_json, replacing_folder, write_json
from vqdeploy.models.maskgit_vqgan import MaskGITVQGANConfig
from vqdeploy.models.movq import MoVQConfig
from vqdeploy.models.rqvae import RQVAEConfig
from vqdeploy.models.var_tokenizer import MultiScaleConfig
from vqdeploy.models.vitvqgan import ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2Config
from vqdeploy.systems import SystemConfig, definition

PRESET = "imported"
"""The preset of every imported system."""


class TokenizerFormat(NamedTuple):
    """A public tokenizer format: a pattern that identifies its weight names, and its reader.

    A reader expects weights of the usual number of dimensions. `import_checkpoint` turns what Python and PyTorch raise
    at others into an `ArtifactError`.
    """

    sign: str
    read: Callable[[Source], Part]


class PriorFormat(NamedTuple):
    """A public prior format, and the kind of tokenizer that it needs."""

    sign: str
    read: Callable[[list[Source], Part], Part]
    tokenizer: type[Config]


# The first match counts, so more specific patterns come first.
TOKENIZERS = {
    "emu3": TokenizerFormat(emu3.TOKENIZER, emu3.tokenizer),
    "movqgan": TokenizerFormat(movqgan.TOKENIZER, movqgan.tokenizer),
    "rq-vae-transformer": TokenizerFormat(rq_vae_transformer.TOKENIZER, rq_vae_transformer.tokenizer),
    "maskgit-jax": TokenizerFormat(maskgit_jax.TOKENIZER, maskgit_jax.tokenizer),
    "enhancing-transformers": TokenizerFormat(enhancing_transformers.TOKENIZER, enhancing_transformers.tokenizer),
    "vq-vae-2": TokenizerFormat(vq_vae_2.TOKENIZER, vq_vae_2.tokenizer),
    "llamagen": TokenizerFormat(llamagen.TOKENIZER, llamagen.tokenizer),
    "var": TokenizerFormat(var.TOKENIZER, var.tokenizer),
    "diffusers": TokenizerFormat(diffusers.TOKENIZER, diffusers.tokenizer),
    "taming": TokenizerFormat(taming.TOKENIZER, taming.tokenizer),
}
PRIORS = {
    "rq-vae-transformer": PriorFormat(rq_vae_transformer.PRIOR, rq_vae_transformer.prior, RQVAEConfig),
    "maskgit-jax": PriorFormat(maskgit_jax.PRIOR, maskgit_jax.prior, MaskGITVQGANConfig),
    "maskgit-pytorch": PriorFormat(maskgit_pytorch.PRIOR, maskgit_pytorch.prior, MoVQConfig),
    "enhancing-transformers": PriorFormat(enhancing_transformers.PRIOR, enhancing_transformers.prior, ViTVQGANConfig),
    "vq-vae-2": PriorFormat(vq_vae_2.PRIOR, vq_vae_2.prior, VQVAE2Config),
    "llamagen": PriorFormat(llamagen.PRIOR, llamagen.prior, MoVQConfig),
    "var": PriorFormat(var.PRIOR, var.prior, MultiScaleConfig),
    "taming": PriorFormat(taming.PRIOR, taming.prior, MoVQConfig),
}
FORMATS = tuple(sorted({*TOKENIZERS, *PRIORS}))
"""Names of the public code bases."""

_STAGES = ("first_stage_model.", "stage1_model.", "vae_local.")  # prefixes of the tokenizer in files of whole systems


def import_checkpoint(
    output: Path,
    tokenizer: Path | None = None,
    priors: Sequence[Path] = (),
    name: str | None = None,
    tokenizer_config: Path | None = None,
    prior_config: Path | None = None,
    labels: Path | None = None,
    raw: bool = False,
) -> dict[str, Any]:
    """Reads public weights and writes a checkpoint folder.

    Args:
        output: The folder.
        tokenizer: File or folder of the tokenizer; None if the file of the prior has it.
        priors: Files of the prior, one per level.
        name: The public code base, one of `FORMATS`; None to detect it.
        tokenizer_config: Configuration of the tokenizer; by default the one beside the weights.
        prior_config: Configuration of the prior, likewise.
        labels: File with class names, one per line or JSON.
        raw: Whether to ignore moving averages.

    Returns:
        `checkpoint` (folder), `model`, `formats`, `parameters` (number by part) and `notes` (messages).

    Raises:
        VqdeployError: A file or a value of the configuration is missing.
        ArtifactError: A file is damaged or has other content.
    """
    if name is not None and name not in FORMATS:
        raise VqdeployError("there is no such format", expected=", ".join(FORMATS), found=repr(name))
    read = (tokenizer, *priors, tokenizer_config, prior_config, labels)
    check_outside(output, [path for path in read if path is not None])
    sources = [containers.read(path, raw, prior_config) for path in priors]
    if tokenizer is not None:
        source = containers.read(tokenizer, raw, tokenizer_config)
    elif sources and any(key.startswith(_STAGES) for key in sources[0].weights):
        source = sources[0]
    else:
        raise VqdeployError("a system needs a tokenizer", fix="add --tokenizer FILE")
    formats = [_format(source, TOKENIZERS, "tokenizer", name)]
    with _malformed(source):
        parts = {"tokenizer": TOKENIZERS[formats[0]].read(source)}
    if not sources and (error := parts["tokenizer"].lacking):
        raise error
    if sources:
        formats.append(_format(sources[0], PRIORS, "prior", name))
        with _malformed(sources[0]):
            parts["prior"] = _prior(sources, PRIORS[formats[1]], parts["tokenizer"])
    config = _system(parts, _labels(labels) if labels else (), formats)
    files = [source] * (tokenizer is not None) + sources
    provenance = {
        "formats": formats,
        "files": [{"file": file.path.name, "taken": file.taken, "bytes": file.path.stat().st_size} for file in files],
    }
    _write(output, config, parts, provenance)
    return {
        "checkpoint": str(output),
        "model": config.model,
        "formats": formats,
        "parameters": {name: sum(w.numel() for w in part.weights.values()) for name, part in parts.items()},
        "notes": [note for file in files for note in file.notes] + _notes(**parts),
    }


def _notes(tokenizer: Part, prior: Part | None = None) -> list[str]:
    """Messages of the parts, without those of the tokenizer on what the prior decides."""
    decided = prior is not None and prior.tokenizer is not None
    return [*(() if decided else tokenizer.notes), *(prior.notes if prior else ())]


@contextlib.contextmanager
def _malformed(source: Source) -> Iterator[None]:
    """Turns what readers raise at weights of known names and impossible shapes into an `ArtifactError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{source.path} and its configuration do not describe a model ({reason})") from error


def _format(source: Source, formats: Mapping[str, TokenizerFormat | PriorFormat], kind: str, name: str | None) -> str:
    """The format of a file: the first match, which must agree with the requested one."""
    fits = next((key for key, known in formats.items() if any(re.match(known.sign, n) for n in source.weights)), None)
    if fits is not None and (name is None or name == fits or name not in formats):
        return fits
    if fits is None and kind == "tokenizer":
        refuse_what_has_no_codes(source)
    shown = ", ".join(list(source.weights)[:2])
    if name in formats:
        fix = None if fits is None else f"--format {fits}"
        raise ArtifactError(f"{source.path} is not a {kind} of {name}", found=f"{shown} and so on", fix=fix)
    raise ArtifactError(
        f"{source.path} is not a {kind} of a known format", expected=" or ".join(formats), found=f"{shown} and so on"
    )


def _prior(sources: list[Source], known: PriorFormat, tokenizer: Part) -> Part:
    """Reads a prior; its tokenizer must be of the right kind."""
    if not isinstance(tokenizer.config, known.tokenizer):
        raise ArtifactError(
            f"the prior in {sources[0].path} does not fit the tokenizer",
            expected=f"one of a {known.tokenizer.__name__.removesuffix('Config')}",
            found=f"a {type(tokenizer.config).__name__.removesuffix('Config')}",
        )
    part = known.read(sources, tokenizer)
    if part.config.classes < 1:
        raise ArtifactError(f"the prior in {sources[0].path} has no classes", expected="1 or more")
    return part


def _labels(file: Path) -> tuple[str, ...]:
    """Class names: one per line, a JSON list, or a JSON object from numbers to names or to lists that end with one.

    Equal names get the numbers of their classes: `crane (134)`.
    """
    check_regular(file)
    try:
        data = read_json(file) if file.suffix == ".json" else file.read_text(encoding="utf-8").split("\n")
        if isinstance(data, dict):
            data = [data[key] for key in sorted(data, key=int)]
    except (OSError, ValueError) as error:  # a key that is not a number, or bytes that are not text
        raise ArtifactError(f"{file} has no class names ({error})") from error
    names = [name[-1] if isinstance(name, list) and name else name for name in data] if isinstance(data, list) else []
    if not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{file} has no class names", expected="a list of strings")
    names = [name.strip() for name in names if name.strip() or file.suffix == ".json"]
    if not names:
        raise ArtifactError(f"{file} has no class names", expected="a list of strings")
    if odd := [name for name in names if not can_be_shown(name)]:
        raise ArtifactError(f"{file} has a name that is not valid", expected="printable characters", found=repr(odd[0]))
    count = Counter(names)  # of the classes of ImageNet, two are called crane, and two maillot
    names = [f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(names)]
    if len(set(names)) < len(names):
        raise ArtifactError(f"{file} gives two classes one name")
    return tuple(names)


def _system(parts: Mapping[str, Part], labels: tuple[str, ...], formats: Sequence[str]) -> SystemConfig:
    tokenizer, prior = parts["tokenizer"], parts.get("prior")
    if labels and prior and getattr(prior.config, "condition_length", 1) > 1:
        raise VqdeployError("a prior that is conditioned on texts has no labels", expected="no --labels")
    if labels and (prior is None or prior.config.classes != len(labels)):
        expected = prior.config.classes if prior else "none without a prior"
        raise VqdeployError("the labels are not those of the prior", expected=expected, found=len(labels))
    model = prior.model if prior else tokenizer.model
    sampling = definition(model).sampling.from_dict(dict(prior.sampling) if prior else {})
    source = " and ".join(dict.fromkeys(formats))
    decided = (prior and prior.tokenizer) or tokenizer.config
    return SystemConfig(model, PRESET, decided, prior.config if prior else None, labels, sampling, source)


def _write(folder: Path, config: SystemConfig, parts: Mapping[str, Part], provenance: dict[str, Any]) -> None:
    """Writes the checkpoint folder."""
    weights = {f"{name}.{key}": w for name, part in parts.items() for key, w in part.weights.items()}
    with replacing_folder(folder, checkpoint.FILES) as new:
        write_json(new / "config.json", config.to_dict())
        write_json(new / "import.json", provenance)
        _stream(weights, new / "model.safetensors")


def _stream(weights: dict[str, Tensor], file: Path) -> None:
    """Writes safetensors one tensor at a time: the writer of the library copies all of them in memory."""
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.numel() * weight.element_size()
        header[name] = {"dtype": _DTYPES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, weight in weights.items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ArtifactError(f"{name} is not finite in these weights")
            flat = weight.detach().contiguous().view(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
