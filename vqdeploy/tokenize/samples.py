"""Images of a data set, and parts of it that each become one shard."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from vqdeploy.errors import ArtifactError, VqdeployError, can_be_shown

_LARGEST_LABEL = 2**31 - 1


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
