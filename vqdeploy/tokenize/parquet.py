"""Parquet files of images, in the form of Hugging Face's `datasets`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from vqdeploy.errors import ArtifactError, are_class_names, escaped
from vqdeploy.files import parse_json
from vqdeploy.tokenize.samples import DamagedDataError, Sample, label_of

_IMAGES, _LABEL = ("image", "img"), "label"
_UNLABELLED = -1  # what `datasets` puts where a label is missing
_ROWS = 16  # in memory at a time


@dataclass(frozen=True)
class ParquetPart:
    """A Parquet file with images in a column `image` or `img`, and labels or names of classes in `label`.

    An image is a struct with the bytes of an image file in its field `bytes`, or these bytes alone.
    """

    name: str
    path: Path
    image: str
    labelled: bool
    classes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the columns and the names of the classes.

        Raises:
            ArtifactError: It is not a Parquet file, has no images, or its classes have no valid names.
        """
        try:
            with path.open("rb") as stream:  # pyarrow takes no path that is not UTF-8
                schema = pq.read_schema(stream)
            names = schema.names
            images = [name for name in _IMAGES if name in names and _holds_bytes(schema.field(name).type)]
        except Exception as error:  # parsers raise anything
            raise ArtifactError(f"{path} is not a Parquet file ({str(error)[:200]})") from error
        if not images:
            expected, found = "a column `image` of bytes", ", ".join(names[:8])
            raise ArtifactError(f"{path} has no images", expected=expected, found=found)
        classes = _class_names(schema)
        if not are_class_names(classes):
            expected, found = "different names of characters that can be printed", ", ".join(classes)
            raise ArtifactError(f"the classes in {path} have no valid names", expected=expected, found=found)
        return cls(path.stem, path, images[0], _LABEL in names, classes)

    def files(self) -> Iterable[tuple[str, Path]]:
        """The file."""
        return ((self.path.name, self.path),)

    def samples(self) -> Iterator[Sample]:
        """The images; the key of each is the number of its row.

        Raises:
            DamagedDataError: The file cannot be read to its end.
        """
        columns = [self.image, *([_LABEL] if self.labelled else [])]
        try:
            with self.path.open("rb") as stream, pq.ParquetFile(stream) as file:
                rows = (row for batch in file.iter_batches(_ROWS, columns=columns) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    yield self._sample(escaped(f"{self.path.name}/{number}"), row[self.image], row.get(_LABEL))
        except Exception as error:  # parsers raise anything
            raise DamagedDataError(f"{self.path} is damaged ({str(error)[:200]})") from error

    def _sample(self, key: str, image: Any, value: object) -> Sample:  # noqa: ANN401 (of a column of any type)
        content = image.get("bytes") if isinstance(image, dict) else image
        try:
            if content is None:
                raise ValueError("its bytes are missing")
            label, name = label_of(None if value == _UNLABELLED else value)
            if label is not None and self.classes:
                name = self.classes[label]
            return Sample(key, content, label, name)
        except (IndexError, ValueError) as error:
            return Sample(key, ArtifactError(f"{key} is not an image with a label ({error})"))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return kind in (pa.binary(), pa.large_binary())


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """The names that `datasets` keeps in the metadata of the schema, or none."""
    try:
        described: Any = parse_json((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][_LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
