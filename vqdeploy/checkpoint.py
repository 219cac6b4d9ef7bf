"""Checkpoints: a folder of `config.json`, `model.safetensors` and, when trained here, `training.json`."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json, replacing_folder, write_json
from vqdeploy.systems import System, SystemConfig, create, definition, preset

FILES = ("config.json", "model.safetensors", "training.json", "import.json", "reconstructions.png", "samples.png")
"""What a checkpoint folder holds; the pictures are for people."""

_SHARES = ("decay", "dropout")

SHIPPED = Path(__file__).parent / "weights"


def save(
    system: System, folder: str | Path, training: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes a checkpoint, replacing one that is there.

    Args:
        system: What to write.
        folder: Where.
        training: Recipe, seed and metrics, for `training.json`.
        dtype: Type of the stored weights, for example `torch.float16`; as they are when None.
    """
    with replacing_folder(Path(folder), FILES) as new:
        write_json(new / "config.json", system.config.to_dict())
        weights = system.state_dict().items()  # copied, because safetensors takes no tied ones
        save_file({k: w.to(dtype or w.dtype, copy=True).contiguous() for k, w in weights}, new / "model.safetensors")
        if training is not None:
            write_json(new / "training.json", training)


def load(folder: str | Path) -> System:
    """Reads a checkpoint into a system in fp32 on the CPU.

    Raises:
        VqdeployError: The folder or one of its files does not exist.
        ArtifactError: A file is damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VqdeployError(f"{folder} is not a checkpoint folder", fix="vqdeploy train --help")
    config = SystemConfig.from_dict(read_json(folder / "config.json"))
    file = folder / "model.safetensors"
    if not file.exists():
        raise VqdeployError(f"{file} does not exist")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged ({error})") from error
    try:
        _check_config(folder / "config.json", config)
        with torch.device("meta"):
            expected = System(config).state_dict()
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'} describes no model ({str(error).splitlines()[0]})") from error
    _check_weights(file, weights, expected)
    system = System(config)
    system.load_state_dict(weights)
    return system.eval()


def _check_config(file: Path, config: SystemConfig) -> None:
    """Refuses a configuration whose parts do not fit each other: graphs made of it would fail late, or silently."""
    tokenizer, prior = config.tokenizer, config.prior
    for part in (tokenizer, prior):
        _check_numbers(file, part)
    if len(tokenizer.pixel_range) != 2 or tokenizer.pixel_range[0] >= tokenizer.pixel_range[1]:
        found = list(tokenizer.pixel_range)
        raise ArtifactError(f"pixel_range in {file} is no range", expected="two rising numbers", found=found)
    sides = [side for side, *_ in getattr(tokenizer, "level_grids", (tokenizer.grid,))]
    if any(side < 1 or tokenizer.resolution % side for side in sides):
        raise ArtifactError(f"the resolution in {file} does not fit its levels", found=tokenizer.resolution)
    if prior is None:
        return
    for name in ("grid", "level_grids", "codebook_size"):
        wanted, given = (getattr(part, name, None) for part in (tokenizer, prior))
        if wanted != given:
            raise ArtifactError(f"{name} of the prior in {file} is not the tokenizer's", expected=wanted, found=given)
    if config.labels and len(config.labels) != prior.classes:
        raise ArtifactError(f"{file} names a wrong number of labels", expected=prior.classes, found=len(config.labels))
    from vqdeploy.runtime.options import choose  # to import this module takes no runtime

    try:
        choose({}, config.sampling.to_dict(), prior.depth, prior.codebook_size)
    except VqdeployError as error:
        raise ArtifactError(f"the sampling in {file} is wrong: {error}") from error


def _check_numbers(file: Path, part: Config | None) -> None:
    """Refuses sizes and counts below 1, or below 0 where that is the default, shares outside 0..1, and infinities."""
    for field in dataclasses.fields(part) if part else ():
        value = getattr(part, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, Config):
                _check_numbers(file, number)
            elif field.type in (int, tuple[int, ...]) and number < (lowest := int(not _may_be_none(field))):
                raise ArtifactError(f"{field.name} in {file} is too small", expected=f"{lowest} or more", found=number)
            elif field.name in _SHARES and not 0 <= number <= 1:
                raise ArtifactError(f"{field.name} in {file} is out of range", expected="0..1", found=number)
            elif isinstance(number, float) and not math.isfinite(number):
                raise ArtifactError(f"{field.name} in {file} is out of range", expected="a finite number", found=number)


def _may_be_none(field: Any) -> bool:
    return field.default == 0 or field.name in ("condition_channels", "condition_res_blocks")


def _check_weights(file: Path, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if odd := sorted(set(weights) ^ set(expected)):
        raise ArtifactError(f"{file} and its config.json name different weights, such as {odd[0]}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            shapes = list(expected[name].shape), list(weight.shape)
            raise ArtifactError(f"{name} in {file} has the wrong shape", expected=shapes[0], found=shapes[1])


def digest(system: System) -> str:
    """sha256 over the configuration and the weights of a system, hexadecimal."""
    total = hashlib.sha256(repr(system.config).encode())
    for name, weight in sorted(system.state_dict().items()):
        total.update(name.encode() + weight.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def source(config: dict[str, Any], expected: str, folder: Path | None, plan: Path) -> System:
    """The checkpoint that a plan was made of: the one in `folder`, or the default of its preset when None.

    Args:
        config: `config` of the plan's manifest.
        expected: Its digest in the manifest.
        folder: Checkpoint folder.
        plan: The plan, for the error.

    Raises:
        VqdeployError: It is another checkpoint.
    """
    if folder is None and config["preset"] not in definition(config["model"]).presets:
        raise VqdeployError(f"{plan} was made of a checkpoint that does not ship", fix="add --checkpoint FOLDER")
    system = load(folder) if folder else default(config["model"], config["preset"])
    check_digest(system, expected, plan)
    return system


def check_digest(system: System, expected: str, plan: Path) -> None:
    """Refuses a system that is not the one with this digest, which `plan` was made of."""
    if (found := digest(system)) != expected:
        raise VqdeployError(
            f"{plan} was made of another checkpoint",
            expected=f"digest {expected[:12]}",
            found=found[:12],
            fix="add --checkpoint FOLDER",
        )


def default(model: str, name: str = "tiny", seed: int = 0) -> System:
    """The shipped checkpoint of a preset, or random weights for one that ships none."""
    config = preset(model, name)
    shipped = SHIPPED / model / name
    return load(shipped) if shipped.is_dir() and any(shipped.iterdir()) else create(config, seed)
