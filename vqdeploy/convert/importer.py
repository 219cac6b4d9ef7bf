"""`vqdeploy import`: published weights to a checkpoint folder, whatever public code wrote them."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdeploy import checkpoint
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
    vq_vae_2,
)
from vqdeploy.convert.containers import Source
from vqdeploy.convert.conv import refuse_what_has_no_codes
from vqdeploy.convert.parts import Part
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json, replacing_folder, write_json
from vqdeploy.systems import SystemConfig, definition

PRESET = "imported"
"""The preset of every imported system."""


@dataclass(frozen=True)
class Format:
    """A public code base: patterns that the names of its weights match, and what reads them."""

    tokenizer: Callable[[Source], Part] | None = None
    tokenizer_sign: str = "(?!)"
    prior: Callable[[list[Source], Part], Part] | None = None
    prior_sign: str = "(?!)"


FORMATS = {  # the first that fits is taken, so those with more particular signs come first
    "emu3": Format(emu3.tokenizer, emu3.TOKENIZER),
    "movqgan": Format(movqgan.tokenizer, movqgan.TOKENIZER),
    "rq-vae-transformer": Format(
        rq_vae_transformer.tokenizer,
        rq_vae_transformer.TOKENIZER,
        rq_vae_transformer.prior,
        rq_vae_transformer.PRIOR,
    ),
    "maskgit-jax": Format(maskgit_jax.tokenizer, maskgit_jax.TOKENIZER, maskgit_jax.prior, maskgit_jax.PRIOR),
    "maskgit-pytorch": Format(prior=maskgit_pytorch.prior, prior_sign=maskgit_pytorch.PRIOR),
    "enhancing-transformers": Format(
        enhancing_transformers.tokenizer,
        enhancing_transformers.TOKENIZER,
        enhancing_transformers.prior,
        enhancing_transformers.PRIOR,
    ),
    "vq-vae-2": Format(vq_vae_2.tokenizer, vq_vae_2.TOKENIZER, vq_vae_2.prior, vq_vae_2.PRIOR),
    "llamagen": Format(llamagen.tokenizer, llamagen.TOKENIZER),
    "diffusers": Format(diffusers.tokenizer, diffusers.TOKENIZER),
    "taming": Format(taming.tokenizer, taming.TOKENIZER, taming.prior, taming.PRIOR),
}
_STAGES = ("first_stage_model.", "stage1_model.")
"""Prefixes of the tokenizer in files that hold a whole system."""


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
    """Reads public weights and writes them as a checkpoint folder.

    Args:
        output: The folder.
        tokenizer: File or folder of the tokenizer; None where the prior's file has it too.
        priors: Files of the prior, one or one for each level.
        name: The public code base, one of `FORMATS`; guessed when None.
        tokenizer_config: Its configuration; the one beside the weights when None.
        prior_config: The same of the prior.
        labels: Names of the classes, one a line or as a JSON list.
        raw: Take the weights themselves and not their moving averages.

    Returns:
        What was written: `checkpoint`, `model`, `formats`, `parameters`, `notes`.

    Raises:
        VqdeployError: A file or a part of the configuration is missing.
        ArtifactError: A file is damaged, or holds something else.
    """
    if name is not None and name not in FORMATS:
        raise VqdeployError("there is no such format", expected=", ".join(FORMATS), found=repr(name))
    sources = [containers.read(path, raw, prior_config) for path in priors]
    if tokenizer is not None:
        source = containers.read(tokenizer, raw, tokenizer_config)
    elif sources and any(key.startswith(_STAGES) for key in sources[0].weights):
        source = sources[0]
    else:
        raise VqdeployError("a system needs a tokenizer", fix="add --tokenizer FILE")
    tokenizer_format = _format(source, "tokenizer", name)
    part = FORMATS[tokenizer_format].tokenizer
    assert part is not None  # noqa: S101
    own = part(source)
    prior, formats = None, [tokenizer_format]
    if sources:
        formats.append(_format(sources[0], "prior", name))
        read_prior = FORMATS[formats[1]].prior
        assert read_prior is not None  # noqa: S101
        prior = read_prior(sources, own)
    config = _system(own, prior, _labels(labels) if labels else (), formats)
    provenance = {
        "formats": formats,
        "files": [{"file": s.path.name, "taken": s.taken, "bytes": s.path.stat().st_size} for s in [source, *sources]],
    }
    parts = {"tokenizer": own} | ({"prior": prior} if prior else {})
    _write(output, config, parts, provenance)
    return {
        "checkpoint": str(output),
        "model": config.model,
        "formats": formats,
        "parameters": {key: sum(w.numel() for w in part.weights.values()) for key, part in parts.items()},
        "notes": [*own.notes, *(prior.notes if prior else ())],
    }


def _format(source: Source, kind: str, name: str | None) -> str:
    """The format of a file, which is the first that fits; another may be named only where that has no such files."""
    fitting = [key for key, known in FORMATS.items() if _matches(source, getattr(known, f"{kind}_sign"))]
    if fitting[:1] == [name]:
        return fitting[0]
    if name is None or getattr(FORMATS[name], kind) is None:
        if fitting:
            return fitting[0]
        if kind == "tokenizer":
            refuse_what_has_no_codes(source)
        raise ArtifactError(
            f"{source.path} is no {kind} of a known format", expected=_known(kind), found=_some(source.weights)
        )
    suggestion = f"--format {fitting[0]}" if fitting else None
    raise ArtifactError(f"{source.path} is no {kind} of {name}", found=_some(source.weights), fix=suggestion)


def _matches(source: Source, sign: str) -> bool:
    return any(re.match(sign, key) for key in source.weights)


def _known(kind: str) -> str:
    return " or ".join(key for key, known in FORMATS.items() if getattr(known, kind))


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:2]) + " and so on"


def _labels(file: Path) -> tuple[str, ...]:
    """Names of classes: a line each, a JSON list, or a JSON object of numbers with names or lists that end with one."""
    if file.suffix != ".json":
        if not file.is_file():
            raise VqdeployError(f"{file} does not exist")
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    data = read_json(file)
    if isinstance(data, dict):
        data = [data[key] for key in sorted(data, key=int)] if all(key.isdecimal() for key in data) else None
    names = [name[-1] if isinstance(name, list) and name else name for name in data or ()]
    if not names or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{file} holds no names of classes", expected="a list of strings")
    return tuple(names)


def _system(tokenizer: Part, prior: Part | None, labels: tuple[str, ...], formats: Sequence[str]) -> SystemConfig:
    model = prior.model if prior else tokenizer.model
    source = " and ".join(dict.fromkeys(formats))
    sampling = definition(model).sampling.from_dict(dict(prior.sampling) if prior else {})
    config = SystemConfig(model, PRESET, tokenizer.config, prior.config if prior else None, labels, sampling, source)
    if labels and (prior is None or prior.config.classes != len(labels)):
        expected = prior.config.classes if prior else "none, for there is no prior"
        raise VqdeployError("the labels are not those of the prior", expected=expected, found=len(labels))
    return SystemConfig.from_dict(config.to_dict())


def _write(folder: Path, config: SystemConfig, parts: dict[str, Part], provenance: dict[str, Any]) -> None:
    """Writes the checkpoint folder."""
    weights = {f"{name}.{key}": w for name, part in parts.items() for key, w in part.weights.items()}
    with replacing_folder(folder, checkpoint.FILES) as new:
        write_json(new / "config.json", config.to_dict())
        write_json(new / "import.json", provenance)
        _stream(weights, new / "model.safetensors")


def _stream(weights: dict[str, Tensor], file: Path) -> None:
    """Writes safetensors one tensor at a time: the library's own writer holds all of them in memory once more."""
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
