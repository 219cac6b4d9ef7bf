"""Data sets of images, in parts that each become one shard: image folders, WebDataset tars and Parquet files."""

import gzip
import hashlib
import io
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple, Protocol, Self, cast

from vqdeploy.errors import ArtifactError, VqdeployError, can_be_shown, escaped
from vqdeploy.files import parse_json
from vqdeploy.runtime.folder import JUNK, files_below, find_labelled, shortened
from vqdeploy.runtime.images import suffixes

TARS, PARQUET = (".tar", ".tar.gz", ".tgz"), ".parquet"

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_EXPECTED = "an image folder, tars or Parquet files"
_MOST_FILES = 1_000_000  # of a range in braces
_MOST_BYTES = 2**28  # of an image and its labels in a tar
_LARGEST_LABEL = 2**31 - 1
_LABELS = ("cls", "json")
_METADATA = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_MOST_METADATA = 2**20  # bytes of one


class DamagedDataError(ArtifactError):
    """A tar or Parquet file that cannot be read to its end."""


class Sample(NamedTuple):
    """An image of a data set.

    Attributes:
        key: Its name, relative to the data; characters that cannot be printed are escaped.
        content: Its file, or the bytes of one, or why there is none.
        label: Index of its class; None where it is not known.
        class_name: Name of its class; None where it is not known.
    """

    key: str
    content: Path | bytes | ArtifactError
    label: int | None = None
    class_name: str | None = None


class Part(Protocol):
    """What becomes one shard."""

    @property
    def name(self) -> str:
        """Name of the shard, without its extension."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the whole data, in order; empty where they are not known."""

    def files(self) -> Iterable[tuple[str, Path]]:
        """The files that it reads, each with what tells it from others of the data, whatever folder that is in."""

    def samples(self) -> Iterator[Sample]:
        """Its images, in order.

        Raises:
            DamagedDataError: A file is damaged, so that images may be missing.
        """


def digest(part: Part) -> str:
    """A digest of the names, sizes and times of the files of a part.

    Raises:
        VqdeployError: A file is gone.
    """
    total = hashlib.sha256()
    for name, file in part.files():
        try:
            status = file.stat()
        except OSError as error:
            raise VqdeployError(f"{file} cannot be read ({error.strerror})") from error
        total.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()


def find(data: str, images: int) -> list[Part]:
    """The parts of a data set.

    Args:
        data: An image folder with a subfolder a class; or a tar, a Parquet file, a folder of these, or a name with a
            range such as `shard-{0000..0009}.tar`.
        images: Images of a part of an image folder. Each tar and each Parquet file is a part.

    Raises:
        VqdeployError: There is no such data, or a folder holds images beside tars or Parquet files.
    """
    path = Path(data)
    if not path.is_dir():
        return _archives(_expanded(data))
    found = sorted(file for file in path.iterdir() if _is_archive(file) and not file.name.startswith("."))
    if not found:
        return _of_folder(path, images)
    others = set(filter(_is_data, files_below(path))).difference(found)
    if others:
        names = sorted(str(file.relative_to(path)) for file in others)
        raise VqdeployError(
            f"{path} holds tars or Parquet files beside other data: {shortened(found)} beside {shortened(names)}",
            expected="one kind of data, and tars and Parquet files in one folder",
        )
    return _archives(found)


def _is_archive(file: Path) -> bool:
    return file.name.lower().endswith((*TARS, PARQUET))


def _is_data(file: Path) -> bool:
    return _is_archive(file) or file.suffix.lower() in suffixes()


def _expanded(data: str) -> list[Path]:
    """A file name, or those of ranges of numbers in braces; leading zeros are kept, as in a shell."""
    if Path(data).exists():
        return [Path(data)]
    parts = _RANGE.split(data)  # text, first, last, text, ...
    *texts, end = parts[::3]
    ranges = [(first, range(int(first), int(last) + 1)) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    if not 0 < math.prod(len(numbers) for _, numbers in ranges) <= _MOST_FILES:
        raise VqdeployError("the range of files is empty or too large", expected="{FIRST..LAST}", found=data)
    pairs = zip(texts, ranges, strict=True)
    written = [[f"{text}{number:0{len(first)}}" for number in numbers] for text, (first, numbers) in pairs]
    return [Path("".join(names) + end) for names in product(*written)]


def _archives(files: list[Path]) -> list[Part]:
    parts: list[Part] = []
    for file in files:
        if not file.is_file():
            raise VqdeployError("there is no such data", expected=_EXPECTED, found=file)
        parts.append(_archive(file))
    (name, count), *_ = Counter(part.name for part in parts).most_common(1)
    if count > 1:
        raise VqdeployError(f"{count} files of the data would become the shard {name}", expected="different names")
    for part in parts:
        if part.classes != parts[0].classes:
            expected, found = (", ".join(each.classes) or "none with names" for each in (parts[0], part))
            what = f"{parts[0].name} and {part.name} have different classes, or in another order"
            raise VqdeployError(what, expected=expected, found=found)
    return parts


def _archive(file: Path) -> Part:
    if file.suffix.lower() == PARQUET:
        from vqdeploy.tokenize.parquet import ParquetPart

        return ParquetPart.open(file)
    for suffix in TARS:
        if file.name.lower().endswith(suffix):
            return TarPart(file.name[: -len(suffix)], file)
    raise VqdeployError("there is no such data", expected=_EXPECTED, found=file)


@dataclass(frozen=True)
class FolderPart:
    """Some images of an image folder: the path of each in the folder, and its label."""

    name: str
    folder: Path
    images: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]

    def files(self) -> Iterable[tuple[str, Path]]:
        """The images, and the label of each."""
        return ((f"{label} {path}", self.folder / path) for path, label in self.images)

    def samples(self) -> Iterator[Sample]:
        """The images."""
        for path, label in self.images:
            known = (label, self.classes[label]) if self.classes else (None, None)
            yield Sample(escaped(path), self.folder / path, *known)


def _of_folder(folder: Path, images: int) -> list[Part]:
    names, files = find_labelled(folder)
    found = [(str(path.relative_to(folder)), label) for path, label in files]
    starts = range(0, len(found), images)
    return [FolderPart(f"{i:06}", folder, tuple(found[at : at + images]), names) for i, at in enumerate(starts)]


@dataclass(frozen=True)
class TarPart:
    """A tar of WebDataset: consecutive members whose names agree up to the first dot are one image and its labels.

    `cls` holds the number or the name of a class, `json` an object with `label` or `cls`. `a.5x.cls` is a label of
    `a.5x.png`, too.
    """

    name: str
    path: Path
    classes: tuple[str, ...] = ()

    def files(self) -> Iterable[tuple[str, Path]]:
        """The tar."""
        return ((self.path.name, self.path),)

    def samples(self) -> Iterator[Sample]:
        """The images, read from front to end."""
        try:
            with (
                _Whole(_decompressed(self.path)) as file,
                _Archive.open(None, "r|*", file) as archive,
            ):
                for (_, key), members in groupby(_members(archive), lambda member: (member.start, member.key)):
                    yield _sample(escaped(f"{self.path.name}/{key}"), members)
        except Exception as error:  # parsers of archives raise anything
            raise DamagedDataError(f"{self.path} is damaged ({error})") from error


def _decompressed(path: Path) -> io.RawIOBase:
    """The content of a file; that of gzip in full, while `tarfile` reads the first of concatenated ones."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(io.RawIOBase, gzip.open(path)) if zipped else io.FileIO(path)


class _Whole(io.BufferedReader):
    """A file whose end is an error: `tarfile` skips what a header declares by reading on, if need be for ever."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes.

        Raises:
            ReadError: There are none.
        """
        if not (found := super().read(size)):
            raise tarfile.ReadError("it is truncated")
        return found


class _Header(tarfile.TarInfo):
    """A header whose damage is an error wherever it is; `tarfile` takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """A header of 512 bytes.

        Raises:
            HeaderError: It is damaged, or announces a name or other metadata of more than a megabyte.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.type in _METADATA and header.size > _MOST_METADATA:
            raise tarfile.InvalidHeaderError("its metadata are too large")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, archive: "_Archive") -> Self:  # type: ignore[override]
        """The next header; an archive ends with a block of zeros, and so does what the file has before its end.

        Raises:
            EOFHeaderError: This is a block of zeros.
            EmptyHeaderError: The file ends here.
            ReadError: It is damaged.
        """
        start = archive.fileobj.tell()
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.end = archive.fileobj.tell()
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "it is truncated") from error
        except tarfile.ReadError:
            if (start, start) != (archive.end, archive.fileobj.tell()):
                raise
            raise tarfile.EmptyHeaderError from None  # type: ignore[attr-defined]


class _Archive(tarfile.TarFile):
    """A tar, or several in one file: `tarfile` ends at the first block of zeros, and `cat` and `tar -A` write more."""

    tarinfo = _Header
    ignore_zeros = True
    end = -1  # of the last block of zeros


class _Member(NamedTuple):
    start: int  # of its archive, as the end of the one before
    key: str
    extension: str
    content: bytes | None  # None where it is too large or sparse


def _members(archive: _Archive) -> Iterator[_Member]:
    """The images and labels in a tar."""
    for info in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # `tarfile` keeps all
        folder, _, name = info.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        known = _is_label(extension) or f".{_kind(extension)}" in suffixes()
        if info.isfile() and stem and known and not set(JUNK).intersection(folder.split("/")):
            # A sparse file holds less than its size, so a small tar could fill the memory.
            fits = info.size <= _MOST_BYTES and not info.issparse()
            stream = archive.extractfile(info) if fits else None
            key = f"{folder}/{stem}" if folder else stem
            yield _Member(archive.end, key, extension, stream.read() if stream else None)


def _sample(key: str, members: Iterable[_Member]) -> Sample:
    try:
        contents = _contents(members)
        images = [name for name in contents if not _is_label(name)]
        images = [name for name in images if "." not in name] or images  # a mask beside it may be `mask.png`
        if len(images) != 1:
            raise ValueError(f"it has {len(images)} images")
        return Sample(key, contents[images[0]], *label_of(_label(contents, images[0])))
    except ValueError as error:
        return Sample(key, ArtifactError(f"{key} is not an image with a label ({error})"))


def _contents(members: Iterable[_Member]) -> dict[str, bytes]:
    """The members of an image by their extensions."""
    contents: dict[str, bytes] = {}
    left = _MOST_BYTES
    for member in members:
        if member.extension in contents:
            raise ValueError("two members have one name")
        if member.content is None:
            raise ValueError(f"a member is sparse or has more than {_MOST_BYTES:,} bytes")
        contents[member.extension] = member.content
        left -= len(member.content)
        if left < 0:
            raise ValueError(f"its members have more than {_MOST_BYTES:,} bytes")
    return contents


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _is_label(extension: str) -> bool:
    return _kind(extension) in _LABELS


def _label(contents: dict[str, bytes], image: str) -> object:
    own = image.removesuffix(_kind(image))  # `5x.` of `5x.png`
    labels = {kind: contents[name] for kind in _LABELS for name in (kind, own + kind) if name in contents}
    if "cls" in labels:
        return labels["cls"].decode().strip()
    if others := [name for name in contents if _kind(name) == "cls"]:
        raise ValueError(f"its class has another name, {others[0]}")
    described = parse_json(labels["json"]) if "json" in labels else None
    values = [described.get(name) for name in ("label", "cls")] if isinstance(described, dict) else []
    return next((value for value in values if value is not None), None)


def label_of(value: object) -> tuple[int | None, str | None]:
    """The label or the name of a class out of a data set; text that is a number is a label.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str) and value.isdecimal() and len(value) < 11:
        value = int(value)
    if value is None:
        return None, None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_LABEL:
        return value, None
    if isinstance(value, str) and can_be_shown(value) and len(value) <= 200:
        return None, value
    raise ValueError("its class is neither a number nor a name")
