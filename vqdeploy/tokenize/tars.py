"""Tars of images, in the form of WebDataset."""

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Self, cast

from vqdeploy.errors import ArtifactError, escaped
from vqdeploy.files import parse_json
from vqdeploy.runtime.folder import JUNK
from vqdeploy.runtime.images import suffixes
from vqdeploy.tokenize.samples import DamagedDataError, Sample, label_of

_MOST_BYTES = 2**28  # of an image and its labels
_LABELS = ("cls", "json")
_METADATA = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_MOST_METADATA = 2**20  # bytes of one


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
        """The images, read from front to end.

        Raises:
            DamagedDataError: The file cannot be read to its end.
        """
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
