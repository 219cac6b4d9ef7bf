"""Plans on disk: an uncompressed ZIP whose members are aligned, so that they can be memory-mapped."""

import contextlib
import hashlib
import json
import mmap
import re
import shutil
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import replacing_file
from vqdeploy.runtime.manifest import FILE, WEIGHTS, Manifest

ALIGNMENT = 4096
_PADDING_ID = 0xD935  # the extra field that Android's zipalign uses
_ZIP64_EXTRA = 20  # zipfile appends this many bytes when it writes sizes in 64 bits
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def write(path: Path, manifest: Manifest, files: Iterable[Path]) -> None:
    """Writes a plan of a manifest and the files that it lists, whole or not at all."""
    with replacing_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(FILE), json.dumps(manifest.to_dict(), indent=1))
        for file in files:
            entry = _entry(file.name)
            start = archive.fp.tell() + 30 + len(entry.filename.encode()) + 4 + _ZIP64_EXTRA  # type: ignore[union-attr]
            padding = -start % ALIGNMENT
            entry.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 22)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # equal content gives equal files


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Bundle:
    """An opened plan. Reading the manifest needs only the standard library; members are views of a memory map.

    Raises:
        VqdeployError: The file does not exist or cannot be read.
        ArtifactError: It is not a plan, is truncated or damaged, or its manifest is of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self.manifest, self._spans = self._read_directory(stream)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise VqdeployError(f"{path} does not exist", fix="vqdeploy build PACKAGE") from error
        except (zipfile.BadZipFile, struct.error, ValueError, KeyError, EOFError, RuntimeError) as error:
            raise ArtifactError(
                f"{path} is not a plan, or is damaged ({error})", fix="vqdeploy build PACKAGE"
            ) from error
        except OSError as error:
            raise VqdeployError(f"{path} cannot be read ({error.strerror})") from error

    def _read_directory(self, stream: BinaryIO) -> tuple[Manifest, dict[str, tuple[int, int]]]:
        with zipfile.ZipFile(stream) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a member is compressed")
            manifest = Manifest.from_dict(json.loads(archive.read(FILE)))
            spans = {}
            for entry in archive.infolist():
                stream.seek(entry.header_offset)
                *_, name, extra = struct.unpack("<IHHHHHIIIHH", stream.read(30))
                start = entry.header_offset + 30 + name + extra
                spans[entry.filename] = (start, start + entry.file_size)
        listed = set(manifest.members)
        needed = {stage.file for stage in manifest.stages} | {WEIGHTS for stage in manifest.stages if stage.weights}
        if missing := sorted(needed - listed | listed - set(spans)):
            raise ArtifactError(f"{self.path} lacks members that its manifest names: {', '.join(missing)}")
        if bad := sorted(name for name in listed if not _NAME.fullmatch(name)):
            raise ArtifactError(f"{self.path} has a member with a forbidden name, {bad[0]!r}")
        end = self.path.stat().st_size
        if any(stop > end for _, stop in spans.values()):
            raise ArtifactError(f"{self.path} is truncated", fix="vqdeploy build PACKAGE")
        return manifest, spans

    def close(self) -> None:
        """Gives the file back, once nothing views it any more."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def member(self, name: str) -> memoryview:
        """The bytes of a member, not copied."""
        start, stop = self._spans[name]
        return memoryview(self._map)[start:stop]

    def verify(self) -> None:
        """Compares the digest of every member.

        Raises:
            ArtifactError: One differs.
        """
        for name, expected in self.manifest.members.items():
            found = hashlib.sha256(self.member(name)).hexdigest()
            if found != expected:
                raise ArtifactError(
                    f"{name} in {self.path} was changed after it was built",
                    expected=f"sha256 {str(expected)[:12]}",
                    found=found[:12],
                    fix="vqdeploy build PACKAGE",
                )

    def sizes(self) -> dict[str, int]:
        """Bytes of each member."""
        return {name: stop - start for name, (start, stop) in self._spans.items()}

    def extract(self, folder: Path) -> list[Path]:
        """Writes every member into a folder, after comparing the digests."""
        self.verify()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in self.manifest.members:
                with replacing_file(folder / name) as file:
                    file.write_bytes(self.member(name))
        except OSError as error:
            raise VqdeployError(f"{folder} cannot be written ({error.strerror})") from error
        return [folder / name for name in self.manifest.members]


def tensors(blob: memoryview) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views, not copied.

    Raises:
        ArtifactError: The header is malformed.
    """
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(bytes(blob[8 : 8 + size]))
        if size > len(blob) - 8 or not isinstance(header, dict):
            raise ValueError("the header is malformed")
        header.pop("__metadata__", None)
        return {name: _view(blob[8 + size :], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"the weights cannot be read ({error})") from error


_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def _view(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    start, stop = data_offsets
    if not 0 <= start <= stop <= len(data) or any(size < 0 for size in shape):
        raise ValueError(f"shape {shape} at {data_offsets}")
    return np.frombuffer(data[start:stop], dtype=_DTYPES[dtype]).reshape(shape)
