"""Readers of weight files: safetensors, PyTorch pickles, flax msgpack, and configurations.

Files are data: nothing in them is imported or called. The format is detected from the first bytes, not the name.
"""

import json
import mmap
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqdeploy.convert import pickles
from vqdeploy.errors import ArtifactError, VqdeployError, one_line
from vqdeploy.files import check_regular

Weights = dict[str, Tensor]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_NAMES = (  # names of weight files in a folder, by priority
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
    "last.ckpt",
    "model.ckpt",
)
_SUBFOLDERS = ("movq", "vqvae", "vqgan")  # subfolders of a diffusers pipeline
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
_RAW = ("state_dict", "model_state_dict", "model", "module", "net", "params", "generator", "vqvae", "vqgan")
_WHOLE = ("vae_local", "var_wo_ddp")  # the networks of a system, in dictionaries of their own
_OTHERS = re.compile(r"optim|lr_sched|scheduler|discriminator|disc$|scaler|callbacks|loops|lpips|^loss|hyper_param")
_WRAPPERS = ("module.", "_forward_module.", "model.")
_INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # within names too
_LARGEST_CONFIG = 1 << 20  # bytes
_LARGEST_PICKLE = 1 << 29  # bytes, weights aside
_DENSEST = 20  # bytes unpacked per byte of an archive; weights hardly compress
_LITTLE = b"little"
_DEEPEST = 64  # nesting depth of dictionaries


@dataclass
class Source:
    """Weights of a file, by their public names.

    Attributes:
        path: The file.
        weights: The weights.
        taken: Path of their dictionary in the file; empty for the whole file.
        config: The configuration; None without one.
        raw: Whether to ignore moving averages.
    """

    path: Path
    weights: Weights
    taken: str
    config: Any = None
    raw: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell the user about the origin of the weights."""
        if _last(self.taken) not in _AVERAGED:
            return ()
        return (f"moving averages are taken, {self.taken} of {self.path.name}; --raw takes the weights themselves",)


def read(path: Path, raw: bool = False, config: Path | None = None) -> Source:
    """Reads the weights of a file or a folder, and their configuration.

    Args:
        path: File of weights, index of shards, or folder that holds one.
        raw: Whether to ignore moving averages of the weights.
        config: The configuration, YAML or JSON; by default `config.json` or `config.yaml` beside the weights.

    Raises:
        VqdeployError: The file does not exist, or a package to read it is missing.
        ArtifactError: The file is damaged, or has no weights that can be read as data.
    """
    file = _file(path)
    tree = _tree(file)
    taken, weights = _choose(file, tree, raw)
    if not config:
        beside = [file.parent / name for name in ("config.json", "config.yaml")]
        config = next((candidate for candidate in beside if candidate.is_file()), None)
    return Source(file, _unwrapped(weights), taken, read_config(config) if config else None, raw)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, *(path / name for name in _SUBFOLDERS)):
        if file := next((folder / name for name in _NAMES if (folder / name).is_file()), None):
            return file
    files = sorted(file for ending in ("safetensors", "bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{ending}"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise VqdeployError(f"{path} does not have exactly one file of weights", expected="the path of one", found=found)


def _tree(file: Path) -> object:
    check_regular(file)
    with file.open("rb") as stream:
        start = stream.read(512)
    if file.name.endswith(".index.json"):
        return _shards(file)
    for sign, what in (
        (b"version https://git-lfs", "is a pointer of Git LFS, and not the file itself (git lfs pull fetches it)"),
        (b"\x89HDF", "is an HDF5 file, which is not read"),
    ):
        if start.startswith(sign):
            raise ArtifactError(f"{file} {what}")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ArtifactError(f"{file} is a web page, not the linked file")
    if not start:
        raise ArtifactError(f"{file} is empty")
    if start[8:9] == b"{":
        return _safetensors(file)
    if start.startswith(b"PK"):
        return _zipped(file)
    if start[0] == 0x80:
        return _pickled(file)
    if 0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return _msgpack(file)
    raise ArtifactError(f"{file} is not a weight file of a known format")


# Safetensors


def _safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, "pt") as stream:
            return {name: stream.get_tensor(name) for name in list(stream.keys())}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{file} is damaged ({str(error) or type(error).__name__})") from error


def _shards(index: Path) -> Weights:
    """All weights of an index of shards."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(shard) for name, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index} is not an index of shards") from error
    weights: Weights = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or shard == "..":
            raise ArtifactError(f"{index} names a file outside its folder", found=shard)
        if shard.endswith(".json"):
            raise ArtifactError(f"{index} names an index among its shards", found=shard)
        if not (index.parent / shard).exists():
            raise VqdeployError(f"{index.parent / shard} does not exist, but {index.name} names it")
        tree = _tree(index.parent / shard)
        found = tree if isinstance(tree, dict) else {}
        wanted = {name for name, place in names.items() if place == shard}
        if lost := sorted(name for name in wanted if not isinstance(found.get(name), Tensor)):
            raise ArtifactError(f"{index.parent / shard} lacks {lost[0]}, which {index.name} promises")
        weights |= {name: found[name] for name in sorted(wanted)}
    return weights


# Pickles


def _zipped(file: Path) -> object:
    try:
        with zipfile.ZipFile(file) as archive:
            member = _pickle_of(file, archive.namelist())
            with archive.open(member) as stream, _Archive(file, archive, member.removesuffix("data.pkl")) as storages:
                info = archive.getinfo(member)
                if info.file_size > _LARGEST_PICKLE:
                    raise ArtifactError("its pickle, without the weights, is too large")
                if info.compress_type != zipfile.ZIP_STORED:
                    storages.count(info.file_size)
                return _without_modules(file, pickles.load(stream, storages))
    except ArtifactError as error:
        raise _of(file, error) from error
    except Exception as error:  # archives and their compressions raise anything
        raise ArtifactError(f"{file} is damaged ({str(error) or type(error).__name__})") from error


def _pickle_of(file: Path, names: list[str]) -> str:
    """Name of the member of an archive that is the pickle of a checkpoint."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ArtifactError(
            f"{file} is a TorchScript program, which would have to be run; where you trust it, save "
            "torch.jit.load(FILE).state_dict() with safetensors and import that"
        )
    member = next((name for name in names if name.endswith("data.pkl")), None)
    if member is None:
        raise ArtifactError(f"{file} is an archive without weights of PyTorch")
    return member


def _pickled(file: Path) -> object:
    try:
        with file.open("rb") as stream:
            return _without_modules(file, _legacy(stream, file.stat().st_size))
    except ArtifactError as error:
        raise _of(file, error) from error
    except Exception as error:
        raise ArtifactError(f"{file} is damaged ({str(error) or type(error).__name__})") from error


def _of(file: Path, error: ArtifactError) -> ArtifactError:
    text = str(error).removesuffix(".")
    return error if str(file) in text else ArtifactError(f"{file} cannot be read: {text}")


class _Archive:
    """The storages of a zipped checkpoint, memory-mapped if uncompressed."""

    def __init__(self, file: Path, archive: zipfile.ZipFile, folder: str):
        self.file, self.archive, self.folder = file, archive, folder
        self.read: dict[str, Tensor] = {}
        self.unpacked = 0  # bytes

    def __enter__(self) -> Self:
        order = f"{self.folder}byteorder"
        if order in self.archive.namelist():
            with self.archive.open(order) as stream:
                if stream.read(len(_LITTLE) + 1) != _LITTLE:
                    raise ArtifactError("its numbers are big-endian")
        with self.file.open("rb") as stream:
            self.mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self

    def __exit__(self, *_: object) -> None:
        pass  # tensors keep the map alive

    def __call__(self, key: str, dtype: torch.dtype, size: int) -> Tensor:
        if key not in self.read:
            self.read[key] = self._tensor(key, dtype, size)
        return self.read[key].view(dtype)

    def count(self, unpacked: int) -> None:
        """Counts bytes that are about to be unpacked; refuses more than weights can be packed into."""
        self.unpacked += unpacked
        if self.unpacked > _DENSEST * self.file.stat().st_size:
            raise ArtifactError(f"unpacked, it is more than {_DENSEST} times as large")

    def _tensor(self, key: str, dtype: torch.dtype, size: int) -> Tensor:
        info = self.archive.getinfo(f"{self.folder}data/{key}")
        bytes_ = size * dtype.itemsize
        if size < 0 or info.file_size < bytes_:
            raise ValueError("a tensor is larger than its storage")
        if not bytes_:
            return torch.empty(0, dtype=dtype)
        if info.compress_type == zipfile.ZIP_STORED:
            header = self.mapped[info.header_offset : info.header_offset + 30]
            name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            start = info.header_offset + 30 + name + extra
            return torch.frombuffer(self.mapped, dtype=dtype, count=size, offset=start)
        self.count(bytes_)
        with self.archive.open(info) as stream:
            return torch.frombuffer(bytearray(stream.read(bytes_)), dtype=dtype, count=size)


def _legacy(stream: BinaryIO, file_size: int) -> object:
    """A checkpoint of PyTorch before 1.6: pickles one after the other, then the elements of all storages."""
    storages: dict[str, Tensor] = {}
    room = file_size

    def storage(key: str, dtype: torch.dtype, size: int) -> Tensor:
        nonlocal room
        if key not in storages:
            if not 0 <= size * dtype.itemsize <= room:
                raise ValueError("its tensors are larger than the file")
            storages[key] = torch.zeros(size, dtype=dtype)
            room -= storages[key].nbytes
        return storages[key].view(dtype)

    first = pickles.load(stream, storage)
    if first != _LEGACY_MAGIC:
        return first  # a pickle without tensors of PyTorch
    pickles.load(stream)  # version
    pickles.load(stream)  # system
    tree = pickles.load(stream, storage)
    for key in pickles.load(stream):
        tensor = storages[str(key)]
        count = int.from_bytes(stream.read(8), "little")
        target = tensor.view(torch.uint8).numpy().data
        if count != len(tensor) or (len(tensor) and stream.readinto(target) != target.nbytes):  # type: ignore[attr-defined]
            raise ArtifactError("its storages are truncated")
    return tree


def _without_modules(file: Path, tree: object) -> object:
    """Rejects a pickle of a class instance instead of a dictionary."""
    if isinstance(tree, pickles.StandIn):
        raise ArtifactError(
            f"{file} holds an object of {tree.name} and not its weights; where you trust it, load it with the project "
            "that wrote it, save its state_dict() with safetensors, and import that"
        )
    return pickles.plain(tree)


# Flax


def _msgpack(file: Path) -> Weights:
    """The weights of a flax file; keys of nested dictionaries are joined by slashes."""
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise VqdeployError(f"{file} is msgpack", fix="pip install msgpack") from error
    try:
        data = file.read_bytes()
        tree = msgpack.unpackb(data, ext_hook=_flax_array, raw=False, strict_map_key=False)
    except Exception as error:  # the parser raises what its hooks raise, and its own
        raise ArtifactError(f"{file} is damaged ({str(error) or type(error).__name__})") from error
    weights: Weights = {}

    def walk(node: object, name: str) -> None:
        if isinstance(node, dict) and "__msgpack_chunked_array__" in node:
            shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
            weights[name] = torch.cat([node["chunks"][str(i)] for i in range(len(node["chunks"]))]).reshape(shape)
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}/{key}" if name else str(key))
        elif isinstance(node, Tensor):
            weights[name] = node

    try:
        walk(tree, "")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{file} is damaged ({str(error) or type(error).__name__})") from error
    return weights


_FLAX_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def _flax_array(code: int, data: bytes) -> object:
    """Extension types of flax.serialization: 1 is an array, 3 a numpy scalar, both as (shape, dtype, bytes)."""
    import msgpack

    if code not in (1, 3):
        return None
    shape, dtype, buffer = msgpack.unpackb(data, raw=False)[:3]
    if isinstance(dtype, bytes):
        dtype = dtype.decode()
    if dtype not in _FLAX_DTYPES:
        raise ValueError(f"{dtype} is not a dtype of weights")
    if not isinstance(buffer, bytes):  # bytearray takes a number as a size
        raise TypeError("an array does not hold bytes")
    flat = torch.frombuffer(bytearray(buffer), dtype=_FLAX_DTYPES[dtype]) if buffer else torch.empty(0)
    return flat.reshape(list(shape))


# Weights in a tree


def _choose(file: Path, tree: object, raw: bool) -> tuple[str, Weights]:
    """The weights of a tree, and the path of their dictionary."""
    found = dict(_dictionaries(tree, "", set()))
    networks = {_last(name): name for name in found if _last(name) in _WHOLE}
    if len(networks) == len(_WHOLE):
        whole = {f"{last}.{key}": w for last, name in networks.items() for key, w in _unwrapped(found[name]).items()}
        return networks[_WHOLE[0]].rpartition("/")[0], whole
    averaged = {name: weights for name, weights in found.items() if _last(name) in _AVERAGED}
    plain = {name: weights for name, weights in found.items() if name not in averaged}
    chosen = next((name for key in (*_RAW, "") for name in plain if _last(name) == key), None)
    if chosen is None and len(plain) == 1:
        (chosen,) = plain
    if averaged and not raw:
        best = next(name for key in _AVERAGED for name in averaged if _last(name) == key)
        if chosen is not None and (lost := set(_unwrapped(plain[chosen])) - set(_unwrapped(averaged[best]))):
            raise ArtifactError(
                f"{file} holds averaged weights under {best!r} that are incomplete, without {min(lost)} and so on",
                fix="add --raw",
            )
        return best, averaged[best]
    if chosen is not None:
        return chosen, plain[chosen]
    if plain:
        names = ", ".join(f"{name} ({len(weights)} tensors)" for name, weights in plain.items())
        raise ArtifactError(
            f"{file} holds weights in several dictionaries", expected="one, or one called state_dict", found=names
        )
    raise ArtifactError(f"{file} holds no weights")


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _dictionaries(tree: object, name: str, seen: set[int]) -> Iterator[tuple[str, Weights]]:
    """All dictionaries that contain mostly tensors, by path."""
    if not isinstance(tree, dict) or id(tree) in seen or name.count("/") > _DEEPEST:
        return
    seen.add(id(tree))
    tensors = {key: value.data for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if len(tensors) * 2 > len(tree):
        yield name, tensors
        return
    for key, value in tree.items():
        if isinstance(key, str) and not _OTHERS.search(key):
            yield from _dictionaries(value, f"{name}/{key}" if name else key, seen)


def _unwrapped(weights: Mapping[str, Tensor]) -> Weights:
    """Strips the prefixes that DDP, DeepSpeed, Lightning, FSDP, checkpointing and torch.compile add to names."""
    names = {_INNER.sub("", key): weight for key, weight in weights.items()}
    while wrapper := next((w for w in _WRAPPERS if names and all(key.startswith(w) for key in names)), None):
        names = {key.removeprefix(wrapper): weight for key, weight in names.items()}
    return names


# Configurations


def read_config(file: Path) -> object:
    """Reads a configuration, YAML or JSON, as data: the only supported tag is a tuple, read as a list.

    Raises:
        VqdeployError: The file does not exist, or PyYAML is missing.
        ArtifactError: It is malformed, or has a tag that creates an object.
    """
    check_regular(file)
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ArtifactError(f"{file} is too large for a configuration")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return json.loads(text)
        return _yaml(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not a configuration ({one_line(error)})") from error


def _yaml(text: str) -> object:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        tuples = {"tag:yaml.org,2002:python/tuple": yaml.SafeLoader.construct_yaml_seq}
        loader.yaml_constructors = loader.yaml_constructors | tuples  # of this loader alone
        return loader.get_single_data()
    except Exception as error:  # its constructors of numbers and dates raise anything
        raise ValueError(str(error) or type(error).__name__) from error
