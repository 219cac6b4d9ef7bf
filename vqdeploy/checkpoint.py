"""Checkpoints: a folder of `config.json`, `model.safetensors` and, when trained here, `training.json`."""

import contextlib
import dataclasses
import hashlib
import json
import math
import threading
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.modules import module as torch_module

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError, are_class_names
from vqdeploy.files import check_regular, read_json, replacing_folder, write_json
from vqdeploy.options import OPTIONS, check_names
from vqdeploy.systems import System, SystemConfig, create, definition, preset

FILES = ("config.json", "model.safetensors", "training.json", "import.json", "reconstructions.png", "samples.png")
"""Files of a checkpoint folder; the pictures are for people."""

_SHARES = ("decay", "dropout")
_WEIGHTS_MADE = 2  # parameters made per weight in the file, at most: some are tied or replaced

SHIPPED = Path(__file__).parent / "weights"


def save(
    system: System, folder: str | Path, training: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Atomically writes a checkpoint; an existing one is replaced.

    Args:
        system: The system to write.
        folder: Output folder.
        training: Recipe, seed and metrics, for `training.json`.
        dtype: Type of the stored weights, for example `torch.float16`; None keeps their types.

    Raises:
        VqdeployError: The folder holds something else, or cannot be written to.
        ArtifactError: A weight is not finite, or overflows the type.
    """
    with replacing_folder(Path(folder), FILES) as new:
        write_json(new / "config.json", system.config.to_dict())
        weights = system.state_dict().items()  # copied, because safetensors rejects tied weights
        stored = {name: weight.to(dtype or weight.dtype, copy=True).contiguous() for name, weight in weights}
        check_finite(stored, folder)
        save_file(stored, new / "model.safetensors")
        if training is not None:
            write_json(new / "training.json", training)


def load(folder: str | Path) -> System:
    """Reads a checkpoint into a system in fp32 on the CPU.

    Raises:
        VqdeployError: The folder or one of its files does not exist.
        ArtifactError: A file is damaged, the weights do not fit the configuration, or one is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VqdeployError(f"{folder} is not a checkpoint folder", fix="vqdeploy train --help")
    config = SystemConfig.from_dict(read_json(folder / "config.json"))
    file = folder / "model.safetensors"
    check_regular(file)
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged ({error})") from error
    try:
        _check_sizes(folder / "config.json", config, sum(weight.numel() for weight in weights.values()))
        _check_config(folder / "config.json", config)
        with torch.device("meta"), _at_most(len(weights)):
            expected = System(config).state_dict()
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'} does not describe a model ({str(error).splitlines()[0]})"
        ) from error
    _check_weights(file, weights, expected)
    system = System(config)
    system.load_state_dict(weights)
    return system.eval()


def _check_config(file: Path, config: SystemConfig) -> None:
    """Rejects an inconsistent configuration, whose graphs would fail late or silently."""
    tokenizer, prior = config.tokenizer, config.prior
    for part in (tokenizer, prior):
        _check_numbers(file, part)
    if len(tokenizer.pixel_range) != 2 or tokenizer.pixel_range[0] >= tokenizer.pixel_range[1]:
        found = list(tokenizer.pixel_range)
        raise ArtifactError(f"pixel_range in {file} is not a range", expected="two ascending numbers", found=found)
    sides = [side for side, *_ in getattr(tokenizer, "level_grids", (tokenizer.grid,))]
    if min(sides) < 1 or tokenizer.resolution % sides[-1]:
        raise ArtifactError(f"the resolution in {file} does not fit its levels", found=tokenizer.resolution)
    if not are_class_names(config.labels):
        expected = "distinct names of printable characters"
        raise ArtifactError(f"{file} has labels that are not valid", expected=expected, found=config.labels)
    if prior is None:
        return
    for name in ("grid", "level_grids", "codebook_size"):
        wanted, given = (getattr(part, name, None) for part in (tokenizer, prior))
        if wanted != given:
            raise ArtifactError(f"{name} of the prior in {file} is not the tokenizer's", expected=wanted, found=given)
    classes = 0 if getattr(prior, "condition_length", 1) > 1 else prior.classes
    if config.labels and len(config.labels) != classes:
        raise ArtifactError(f"{file} names a wrong number of labels", expected=classes, found=len(config.labels))
    options = config.sampling.to_dict()
    try:
        check_names(set(options))
        for name, value in options.items():
            OPTIONS[name].check(value, prior.codebook_size)
    except VqdeployError as error:
        raise ArtifactError(f"the sampling in {file} is wrong: {error}") from error


def _check_sizes(file: Path, config: SystemConfig, elements: int) -> None:
    """Rejects sizes and counts above the number of stored weights, before anything of that size is allocated."""
    for part in (config.tokenizer, config.prior):
        for name, number in _numbers(part):
            if isinstance(number, int) and number > elements:
                expected = f"at most {elements}, the number of weights"
                raise ArtifactError(f"{name} in {file} is too large", expected=expected, found=number)


def _numbers(part: object, name: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a configuration, with the names of their fields."""
    if isinstance(part, Config):
        for field in dataclasses.fields(part):
            yield from _numbers(getattr(part, field.name), field.name)
    elif isinstance(part, tuple):
        for item in part:
            yield from _numbers(item, name)
    elif isinstance(part, int | float):
        yield name, part


@contextlib.contextmanager
def _at_most(weights: int) -> Iterator[None]:
    """Aborts the construction of a model that has far more weights than the file."""
    owner, left = threading.get_ident(), _WEIGHTS_MADE * weights + _WEIGHTS_MADE

    def count(*_: object) -> None:
        nonlocal left
        if threading.get_ident() == owner:
            left -= 1
            if left < 0:
                raise ValueError(f"it has more than the {weights} weights of the file")

    with (
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ):
        yield


def _check_numbers(file: Path, part: Config | None) -> None:
    """Rejects sizes and counts below 1 (or 0 if that is the default), shares outside 0..1, and infinities."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part) if part else ():
        value = getattr(part, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, Config):
                _check_numbers(file, number)
            elif hints[field.name] in (int, tuple[int, ...]) and number < (lowest := int(not _may_be_none(field))):
                raise ArtifactError(f"{field.name} in {file} is too small", expected=f"{lowest} or more", found=number)
            elif field.name in _SHARES and not 0 <= number <= 1:
                raise ArtifactError(f"{field.name} in {file} is out of range", expected="0..1", found=number)
            elif isinstance(number, float) and not math.isfinite(number):
                raise ArtifactError(f"{field.name} in {file} is out of range", expected="a finite number", found=number)


def _may_be_none(field: "dataclasses.Field[Any]") -> bool:
    return field.default == 0 or field.name in ("condition_channels", "condition_res_blocks")


def _check_weights(file: Path, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if odd := sorted(set(weights) ^ set(expected)):
        raise ArtifactError(f"{file} and its config.json do not have the same weights, such as {odd[0]}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            shapes = list(expected[name].shape), list(weight.shape)
            raise ArtifactError(f"{name} in {file} has the wrong shape", expected=shapes[0], found=shapes[1])
        check_finite({name: weight.to(expected[name].dtype)}, file)


def check_finite(weights: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Rejects weights with NaN or infinities.

    Raises:
        ArtifactError: It names the first such weight and `where`.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ArtifactError(f"{name} in {where} is not finite", expected="numbers", found="NaN or infinity")


def digest(system: System) -> str:
    """Hexadecimal sha256 of a system: of the non-default fields of its configuration, and of its weights."""
    config = json.dumps(system.config.differences(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    total = hashlib.sha256(config.encode())
    for name, weight in sorted(system.state_dict().items()):
        array = weight.detach().contiguous().numpy()
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def source(config: dict[str, Any], expected: str, folder: Path | None, plan: Path) -> System:
    """The checkpoint that a plan was made from: the one in `folder`, or the shipped one of its preset if None.

    Args:
        config: `config` of the plan's manifest.
        expected: Its digest in the manifest.
        folder: Checkpoint folder.
        plan: The plan, for error messages.

    Raises:
        VqdeployError: The digest differs, or the plan was not made from a checkpoint.
    """
    if "model" not in config:
        fix = "vqdeploy.verify.modules.verify(PLAN, MODULE, STAGES), in Python"
        raise VqdeployError(f"{plan} was made from a module, not from a checkpoint", fix=fix)
    if folder is None and config["preset"] not in definition(config["model"]).presets:
        raise VqdeployError(f"{plan} was made from a checkpoint that is not shipped", fix="add --checkpoint FOLDER")
    system = load(folder) if folder else default(config["model"], config["preset"])
    check_digest(system, expected, plan)
    return system


def check_digest(system: System, expected: str, made: Path, option: str = "--checkpoint") -> None:
    """Rejects a system that is not the one that a plan or codes were made from.

    Args:
        system: The system of a checkpoint.
        expected: Hexadecimal sha256 of the one that `made` was made from.
        made: A plan or a folder of codes.
        option: What names the checkpoint on the command line.

    Raises:
        VqdeployError: The digests differ.
    """
    if (found := digest(system)) != expected:
        raise VqdeployError(
            f"{made} was made from another checkpoint",
            expected=f"digest {expected[:12]}",
            found=found[:12],
            fix=f"name the checkpoint it was made from, {option} FOLDER",
        )


def default(model: str, name: str = "tiny", seed: int = 0) -> System:
    """The shipped checkpoint of a preset, or random weights if none is shipped.

    Raises:
        VqdeployError: There is no such model or preset.
        ArtifactError: The shipped checkpoint is damaged.
    """
    config = preset(model, name)
    shipped = SHIPPED / model / name
    return load(shipped) if shipped.is_dir() and any(shipped.iterdir()) else create(config, seed)
