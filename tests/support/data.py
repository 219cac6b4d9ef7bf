"""Data sets of a few images in every form, and what is in a folder of codes."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog")


def png(number, size=(24, 18)):
    """An image file of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def rows(codes):
    """The rows of a folder of codes by key."""
    table = pq.read_table(codes)
    found = {row["key"]: (row["label"], row["class"], row["codes"]) for row in table.to_pylist()}
    assert len(found) == len(table)
    return found


def datasets_table(numbers, labels=None, names=CLASSES):
    """Images and labels as Hugging Face's `datasets` writes them."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": None if n is None else n if isinstance(n, bytes) else png(n), "path": None} for n in numbers]
    labels = [None if n is None else n % 2 if isinstance(n, int) else 0 for n in numbers] if labels is None else labels
    schema = pa.schema(
        {"image": struct, "label": pa.int64()}, {"huggingface": json.dumps({"info": {"features": features}})}
    )
    return pa.table({"image": images, "label": labels}, schema)
