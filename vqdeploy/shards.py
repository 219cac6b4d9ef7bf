"""Folders of codes: Parquet shards that say what they were made of, and a summary when all are there.

A shard has one row for each image: `key` (string), `label` (int32 or null), `class` (string or null) and `codes`, all
maps of the image flattened, coarse to fine, as a fixed-size list of int16, or of int32 if the codebook has more than
32,768 codes. The metadata of its schema has a `ShardInfo` as JSON under `vqdeploy`.

pyarrow is given open files, as it takes no path that is not UTF-8.
"""

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError, are_class_names, one_line
from vqdeploy.files import check_regular, parse_json, read_json, replacing_file, to_json, write_json

SUFFIX, SUMMARY, ERRORS = ".parquet", "_summary.json", "_errors.jsonl"  # readers of Parquet skip names with _
FILES = (f"*{SUFFIX}", SUMMARY, ERRORS)
"""Files of a folder of codes."""

_KEY = b"vqdeploy"
_MOST_CLASSES = 2**20  # of labels without names
_MOST_CODES = 2**24  # of an image
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError)


@dataclass(frozen=True)
class Origin(Config):
    """What codes were made with.

    Attributes:
        plan: Digest of the plan's manifest, and so of all that is in it.
        system: Name of the system; None for an own module.
        checkpoint: Digest of its checkpoint.
        image: Height, width and channels of the images, after they were resized.
        maps: Height, width and depth of each code map, coarse to fine.
        codebook_size: Number of codes in the codebook.
    """

    plan: str
    system: str | None
    checkpoint: str
    image: tuple[int, ...]
    maps: tuple[tuple[int, ...], ...]
    codebook_size: int

    @property
    def length(self) -> int:
        """Number of codes of an image."""
        return sum(map(math.prod, self.maps))


@dataclass(frozen=True)
class ShardInfo(Config):
    """What a shard says of itself.

    Attributes:
        origin: What its codes were made with.
        input: Digest of the names, sizes and times of its input files.
        classes: Names of the classes of the whole data, in order of their labels; empty where they are not known.
        errors: Key of each image that could not be read, and why.
    """

    origin: Origin
    input: str
    classes: tuple[str, ...] = ()
    errors: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Summary(Config):
    """The content of `_summary.json`, which is there once all shards are.

    `images` and `errors` are the numbers of images with codes and without.
    """

    origin: Origin
    shards: int
    images: int
    errors: int


@dataclass
class Rows:
    """The rows of a shard."""

    keys: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)


def write(path: Path, info: ShardInfo, rows: Rows) -> None:
    """Writes a shard atomically.

    Raises:
        VqdeployError: The file cannot be written.
    """
    kind = pa.int16() if info.origin.codebook_size <= 2**15 else pa.int32()
    schema = pa.schema(
        {"key": pa.string(), "label": pa.int32(), "class": pa.string(), "codes": pa.list_(kind, info.origin.length)},
        {_KEY: to_json(info.to_dict())},
    )
    codes = np.concatenate([np.empty(0, np.int64), *(row.reshape(-1) for row in rows.codes)])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(codes, kind), info.origin.length)
    table = pa.table([pa.array(rows.keys, pa.string()), rows.labels, rows.classes, lists], schema)
    with replacing_file(path) as file, file.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", use_dictionary=["class"], write_page_checksum=True)


def read_info(path: Path) -> tuple[ShardInfo, int]:
    """What a shard says of itself, and its number of rows.

    Raises:
        ArtifactError: It is not a shard of codes.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            metadata = pq.read_metadata(stream)
        info = ShardInfo.from_dict(parse_json((metadata.metadata or {})[_KEY]))
        _check(info)
        return info, int(metadata.num_rows)
    except (*_DAMAGE, ArtifactError) as error:
        raise ArtifactError(f"{path} is not a shard of codes ({one_line(error, 200)})") from error


def _check(info: ShardInfo) -> None:
    origin = info.origin
    sizes = [size for each in (origin.image, *origin.maps) for size in each]
    shaped = bool(origin.maps) and {len(each) for each in (origin.image, *origin.maps)} == {3} and min(sizes) > 0
    if not shaped or origin.length > _MOST_CODES or not 0 < origin.codebook_size <= 2**31:
        raise ValueError("its images or code maps have no such size")
    if not are_class_names(info.classes):
        raise ValueError("its classes have no valid names")


def names(folder: Path) -> list[str]:
    """The names of the shards in a folder, in order."""
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}"))


def finish(folder: Path) -> Summary:
    """Writes the summary of a folder whose shards are all there, and the table of images that could not be read.

    Raises:
        VqdeployError: A file cannot be written.
        ArtifactError: A shard is damaged.
    """
    infos = [read_info(folder / name) for name in names(folder)]
    errors = [error for info, _ in infos for error in info.errors]
    with replacing_file(folder / ERRORS) as file:
        file.write_text("".join(f"{to_json(error)}\n" for error in errors), encoding="utf-8")
    summary = Summary(infos[0][0].origin, len(infos), sum(rows for _, rows in infos), len(errors))
    with replacing_file(folder / SUMMARY) as file:
        write_json(file, summary.to_dict())
    return summary


@dataclass(frozen=True)
class Codes:
    """A folder of codes in memory.

    Attributes:
        origin: What they were made with.
        classes: Names of the classes, in order; empty when the images have none.
        labels: Class of each image int64 [N]; 0 without classes.
        codes: int16 or int32 [N, length].
        fingerprint: Digest of the labels and codes.
    """

    origin: Origin
    classes: tuple[str, ...]
    labels: np.ndarray
    codes: np.ndarray
    fingerprint: str


def read(folder: Path) -> Codes:
    """Reads a complete folder of codes.

    Raises:
        VqdeployError: It is not complete, or some of its images have a class and others none.
        ArtifactError: It is damaged.
    """
    if not (folder / SUMMARY).exists():
        raise VqdeployError(f"{folder} is not complete", fix="run the same vqdeploy tokenize again")
    summary, found = Summary.from_dict(read_json(folder / SUMMARY)), names(folder)
    infos = [read_info(folder / name) for name in found]
    images = sum(rows for _, rows in infos)
    if (len(found), images) != (summary.shards, summary.images) or not images:
        expected = f"{summary.images} images in {summary.shards} shards"
        raise ArtifactError(f"{folder} is damaged", expected=expected, found=f"{images} in {len(found)}")
    origin, classes = summary.origin, infos[0][0].classes
    if any((info.origin, info.classes) != (origin, classes) for info, _ in infos):
        raise ArtifactError(f"{folder} is damaged (its shards were made with different plans or data)")
    table = pa.concat_tables([_table(folder / name, origin) for name in found])
    codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, origin.length)
    classes, labels = _labels(folder, table, classes)
    digest = hashlib.sha256(labels.tobytes() + b"".join(name.encode() + b"\0" for name in classes))
    digest.update(codes.tobytes())
    return Codes(origin, classes, labels, codes, digest.hexdigest())


def _table(path: Path, origin: Origin) -> pa.Table:
    """The labels, class names and codes of a shard."""
    columns = {"label": [pa.int32()], "class": [pa.string()]}
    columns["codes"] = [pa.list_(kind, origin.length) for kind in (pa.int16(), pa.int32())]
    try:
        with path.open("rb") as stream:
            table = pq.read_table(stream, columns=list(columns), page_checksum_verification=True)
        if bad := [name for name, kinds in columns.items() if table.schema.field(name).type not in kinds]:
            raise ValueError(f"its column {bad[0]} has another type")
        values = table["codes"].combine_chunks().flatten()
        if len(values) != len(table) * origin.length or values.null_count:
            raise ValueError("an image lacks codes")
        bounds = pc.min_max(values).as_py() if len(values) else {"min": 0, "max": 0}
        if bounds["min"] < 0 or bounds["max"] >= origin.codebook_size:
            raise ValueError(f"its codes are not in 0..{origin.codebook_size - 1}")
    except _DAMAGE as error:
        raise ArtifactError(f"{path} is not a shard of codes ({one_line(error, 200)})") from error
    return table.replace_schema_metadata(None)


def _labels(folder: Path, table: pa.Table, classes: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes and the label of each image; names without labels are numbered in their order."""
    named = not classes and table["class"].null_count < len(table)
    column = table["class"] if named else table["label"]
    if column.null_count == len(table):
        return (), np.zeros(len(table), np.int64)
    if column.null_count:
        raise VqdeployError(f"{column.null_count} of {len(table)} images in {folder} have no class")
    if named:
        classes = tuple(sorted(pc.unique(column).to_pylist()))
        if not are_class_names(classes):
            raise ArtifactError(
                f"the classes in {folder} have no valid names", expected="characters that can be printed"
            )
        column = pc.index_in(column, value_set=pa.array(classes))
    labels = column.to_numpy().astype(np.int64)
    classes = classes or tuple(str(label) for label in range(min(int(labels.max()), _MOST_CLASSES) + 1))
    if labels.min() < 0 or labels.max() >= len(classes):
        expected, found = f"0..{len(classes) - 1}", f"{labels.min()}..{labels.max()}"
        raise ArtifactError(f"labels in {folder} are out of range", expected=expected, found=found)
    return classes, labels
