"""Data sets of images, in parts that each become one shard: image folders, WebDataset tars and Parquet files."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from vqdeploy.errors import VqdeployError, escaped
from vqdeploy.runtime.folder import files_below, find_labelled, shortened
from vqdeploy.runtime.images import suffixes
from vqdeploy.tokenize.samples import Part, Sample
from vqdeploy.tokenize.tars import TarPart

TARS, PARQUET = (".tar", ".tar.gz", ".tgz"), ".parquet"

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_EXPECTED = "an image folder, tars or Parquet files"
_MOST_FILES = 1_000_000  # of a range in braces


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
