"""Plans on disk: an uncompressed ZIP whose members are aligned, so that they can be memory-mapped."""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import struct
import threading
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import parse_json, replacing_file
from vqdeploy.runtime.manifest import FILE, WEIGHTS, Manifest

ALIGNMENT = 4096
_PADDING_ID = 0xD935  # the extra field that Android's zipalign uses
_ZIP64_EXTRA = 20  # zipfile appends this many bytes when it writes sizes in 64 bits
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIRECTORY_BYTES = 1 << 20  # limit of the ZIP directory: an entry takes a few hundred
_HEADER_BYTES = 1 << 26  # limit of the manifest and of the safetensors header, far above any model
_CHUNK = 1 << 22
_PAGES_S = 0.01  # seconds, in which an engine copies a few megabytes
_REBUILD = "vqdeploy build PACKAGE"
_DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    EOFError,
)
"""What parsers raise on malformed bytes."""


def write(path: Path, manifest: Manifest, files: Iterable[Path]) -> None:
    """Atomically writes a plan: the manifest and the files that it lists.

    Raises:
        VqdeployError: The folder cannot be written to, or the disk is full.
    """
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
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # reproducible: equal content gives equal bytes


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading. Pipes and devices are rejected: reading one may never end.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


_SEEKING = threading.Lock()


def _read_at(stream: FileIO, size: int, start: int) -> bytes:
    """At most `size` bytes from a position, whichever thread reads elsewhere."""
    if hasattr(os, "pread"):
        return os.pread(stream.fileno(), size, start)
    with _SEEKING:  # Windows reads only where the file stands, which all threads share
        stream.seek(start)
        return stream.read(size)


class Bundle:
    """An opened plan. Reading the manifest needs only the standard library; members are views of a memory map.

    Small members are read, not mapped: if the file is truncated while it is open, touching a mapped page that is gone
    kills the process with SIGBUS.

    Raises:
        VqdeployError: The file does not exist or cannot be read.
        ArtifactError: It is not a plan, is truncated or damaged, or its manifest is of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._stream = open_regular(self.path)
        except FileNotFoundError as error:
            raise VqdeployError(f"{path} does not exist", fix=_REBUILD) from error
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EINVAL and not self.path.is_dir():
                raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error  # type: ignore[union-attr]
            raise VqdeployError(f"{path} cannot be read ({getattr(error, 'strerror', error)})") from error
        self._closed = weakref.finalize(self, self._stream.close)
        try:
            self._spans = _directory(self._stream)
            self.manifest = Manifest.from_dict(parse_json(self.read(FILE)))
            self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ)
        except VqdeployError:
            raise
        except OSError as error:
            raise VqdeployError(f"{path} cannot be read ({error.strerror})") from error
        except _DAMAGE as error:
            raise ArtifactError(f"{path} is not a plan, or is damaged ({error})", fix=_REBUILD) from error
        self._check_members()

    def _check_members(self) -> None:
        stages, listed = self.manifest.stages, set(self.manifest.members)
        needed = {stage.file for stage in stages} | {WEIGHTS for stage in stages if stage.weights}
        if missing := sorted(needed - listed | listed - set(self._spans)):
            raise ArtifactError(f"{self.path} lacks members that its manifest names: {', '.join(missing)}")
        if bad := sorted(name for name in listed if not _NAME.fullmatch(name)):
            raise ArtifactError(f"{self.path} has a member with a forbidden name, {bad[0]!r}")

    def close(self) -> None:
        """Closes the file. The memory map goes when its last view does."""
        self._closed()
        with contextlib.suppress(BufferError):
            self._map.close()

    def member(self, name: str) -> memoryview:
        """The bytes of a member, as a view of the memory map.

        Raises:
            ArtifactError: The file was truncated after it was opened: touching the view would kill the process.
        """
        start, stop = self._spans[name]
        if self.status().st_size < len(self._map):
            raise ArtifactError(f"{self.path} was truncated while it was open", fix=_REBUILD)
        return memoryview(self._map)[start:stop]

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights as views of the memory map; their header is read, not mapped.

        Raises:
            ArtifactError: The header is malformed, or the file was truncated after it was opened.
        """
        blob, start = self.member(WEIGHTS), self._spans[WEIGHTS][0]
        size = int.from_bytes(_read_at(self._stream, 8, start), "little")
        header = _read_at(self._stream, min(size, _HEADER_BYTES + 1), start + 8)
        return _views(header, blob, size)

    def read(self, name: str) -> bytes:
        """A copy of the bytes of a small member, which later changes of the file do not affect.

        Raises:
            ArtifactError: It is too large, or the file was truncated.
        """
        start, stop = self._spans[name]
        if stop - start > _HEADER_BYTES:
            raise ArtifactError(f"{name} in {self.path} is too large", expected=f"{_HEADER_BYTES} bytes or less")
        return b"".join(self._chunks(name))

    def _chunks(self, name: str) -> Iterator[bytes]:
        start, stop = self._spans[name]
        while start < stop:
            chunk = _read_at(self._stream, min(_CHUNK, stop - start), start)
            if not chunk:
                raise ArtifactError(f"{self.path} was truncated while it was read", fix=_REBUILD)
            start += len(chunk)
            yield chunk

    def status(self) -> os.stat_result:
        """Size, times and identity of the open file."""
        return os.fstat(self._stream.fileno())

    @contextlib.contextmanager
    def sparing_memory(self) -> Iterator[None]:
        """While the block runs, pages of the memory map are returned soon after they were read.

        An engine that copies weights as it opens would otherwise hold them twice. Pages that are needed again are read
        from the cache of the system.
        """
        done = threading.Event()
        keeper = threading.Thread(target=self._return_pages, args=(done,), name="pages", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()

    def _return_pages(self, done: threading.Event) -> None:
        last = False
        while not last:
            last = done.wait(_PAGES_S)
            if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such call
                self._map.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Checks the sha256 of every member.

        Raises:
            ArtifactError: A digest differs, or the file was truncated after it was opened.
        """
        for name, expected in self.manifest.members.items():
            digest = hashlib.sha256()
            for chunk in self._chunks(name):
                digest.update(chunk)
            if (found := digest.hexdigest()) != expected:
                raise ArtifactError(
                    f"{name} in {self.path} was changed after it was built",
                    expected=f"sha256 {str(expected)[:12]}",
                    found=found[:12],
                    fix=_REBUILD,
                )

    def sizes(self) -> dict[str, int]:
        """Size of each member in bytes."""
        return {name: stop - start for name, (start, stop) in self._spans.items()}

    def copy(self, name: str, file: Path) -> None:
        """Writes the bytes of a member to a file.

        Raises:
            ArtifactError: The plan was truncated after it was opened.
        """
        with file.open("wb") as target:
            target.writelines(self._chunks(name))

    def extract(self, folder: Path) -> list[Path]:
        """Checks the digests, then writes every member into a folder and returns the paths.

        Raises:
            VqdeployError: The folder cannot be written.
            ArtifactError: A digest differs, or the plan was truncated after it was opened.
        """
        self.verify()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in self.manifest.members:
                with replacing_file(folder / name) as file:
                    self.copy(name, file)
        except OSError as error:
            raise VqdeployError(f"{folder} cannot be written ({error.strerror})") from error
        return [folder / name for name in self.manifest.members]


class _Sparing:
    """A file that limits the size of one read, against a ZIP directory that claims to be huge."""

    def __init__(self, stream: BinaryIO):
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable
        self._read = stream.read

    def read(self, size: int = -1) -> bytes:
        """As of a file, up to the limit."""
        content = self._read(_DIRECTORY_BYTES + 1 if size < 0 else min(size, _DIRECTORY_BYTES + 1))
        if len(content) > _DIRECTORY_BYTES:
            raise ValueError("its directory is too large")
        return content


def _directory(stream: FileIO) -> dict[str, tuple[int, int]]:
    """The byte range of each member of a plan."""
    spans, end = {}, os.fstat(stream.fileno()).st_size
    with zipfile.ZipFile(_Sparing(stream)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    last = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError("a member is compressed or encrypted")
        if entry.filename in spans:
            raise ValueError("two members have one name")
        header = _read_at(stream, 30, entry.header_offset)
        signature, *_, name, extra = struct.unpack("<4sHHHHHIIIHH", header)
        start = entry.header_offset + 30 + name + extra
        if signature != b"PK\3\4" or entry.header_offset < last:
            raise ValueError("its members overlap")
        last = start + entry.file_size
        if last > end:
            raise ValueError("it is truncated")
        spans[entry.filename] = start, last
    return spans


class Weight(NamedTuple):
    """Type, shape and byte range of a tensor in a safetensors file; offsets count from the end of the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def tensors(blob: memoryview) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of its bytes.

    Raises:
        ArtifactError: The header is malformed.
    """
    size = int.from_bytes(blob[:8], "little")
    return _views(bytes(blob[8 : 8 + size]) if size <= _HEADER_BYTES else b"", blob, size)


def _views(header: bytes, blob: memoryview, size: int) -> dict[str, np.ndarray]:
    """The tensors that a header of `size` bytes describes, as views of the bytes of the file."""
    if len(blob) < 8 or size > len(blob) - 8:
        raise ArtifactError("the weights cannot be read (they are truncated)")
    data = blob[8 + size :]
    found = weights(header if size <= _HEADER_BYTES else b"", len(data))
    return {name: np.frombuffer(data[w.start : w.stop], w.dtype).reshape(w.shape) for name, w in found.items()}


def read_weights(file: Path) -> dict[str, Weight]:
    """The tensors that a safetensors file declares; only the header is read.

    Raises:
        ArtifactError: The file is damaged.
        OSError: It cannot be read.
    """
    with open_regular(file) as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size) if size <= _HEADER_BYTES else b""
        return weights(header, os.fstat(stream.fileno()).st_size - 8 - size)


def data_offset(file: Path) -> int:
    """Where the bytes of the tensors of a safetensors file start."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def weights(header: bytes, size: int) -> dict[str, Weight]:
    """Parses the header of a safetensors file and checks it against the number of bytes that follow.

    Raises:
        ArtifactError: The header is malformed.
    """
    try:
        entries = parse_json(header)
        if not isinstance(entries, dict):
            raise TypeError("the header is not an object")
        entries.pop("__metadata__", None)
        found = {name: _weight(**entry) for name, entry in entries.items()}
    except (AttributeError, *_DAMAGE) as error:
        raise ArtifactError(f"the weights cannot be read ({error})") from error
    if bad := [name for name, weight in found.items() if weight.stop > size]:
        raise ArtifactError(f"the weights cannot be read ({bad[0]} exceeds the file)")
    return found


_DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I8": np.int8,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _weight(dtype: str, shape: list[int], data_offsets: list[int]) -> Weight:
    start, stop = data_offsets
    kind = np.dtype(_DTYPES[dtype])
    if not all(type(size) is int and size >= 0 for size in (*shape, start, stop)) or len(shape) > 32:
        raise ValueError(f"shape {shape} at {data_offsets}")
    if math.prod(size or 1 for size in shape) * kind.itemsize >= 1 << 63:  # of none, too: NumPy refuses it
        raise ValueError(f"shape {shape} is too large")
    if stop - start != math.prod(shape) * kind.itemsize or start % kind.itemsize:
        raise ValueError(f"{dtype} of shape {shape} at {data_offsets}")
    return Weight(kind, tuple(shape), start, stop)
