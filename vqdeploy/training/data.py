"""Datasets of pairs (image uint8 [3, R, R] or its codes, label), with a fixed held-out part."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from vqdeploy.errors import ArtifactError, VqdeployError, missing
from vqdeploy.models.pixels import channels_first
from vqdeploy.runtime.folder import find_labelled, shortened
from vqdeploy.runtime.images import open_image, square
from vqdeploy.runtime.threads import cores
from vqdeploy.systems.recipe import Recipe

if TYPE_CHECKING:
    from vqdeploy.shards import Origin

log = logging.getLogger("vqdeploy")

T = TypeVar("T")
Item = tuple[Tensor, int]
_CUBIC = Image.Resampling.BICUBIC


class Images(Dataset[Item]):
    """A map-style dataset."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        return self.item(index)

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """An image uint8 [3, R, R] or its codes int64, and its label; with `rng`, the image is augmented.

        Raises:
            NotImplementedError: In this class.
        """
        raise NotImplementedError

    def draw(self, rng: np.random.Generator) -> int:
        """The index of an image to train on."""
        return int(rng.integers(len(self)))


class Draws(Images):
    """The image sequence of a whole training run: drawn with replacement, and augmented.

    Each depends only on the seed and its index. So a resumed run sees the same images as an uninterrupted one, for any
    number of loader processes.
    """

    def __init__(self, images: Images, seed: int, count: int):
        self.images, self.seed, self.count = images, seed, count

    def __len__(self) -> int:
        return self.count

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """The image at this index of the sequence, and its label."""
        rng = rng or np.random.default_rng((self.seed, index))
        return self.images.item(self.images.draw(rng), rng)


class Data(NamedTuple):
    """`labels` names the classes and is empty when there are none; the label of every image is then 0.

    `workers` is the number of loader processes that keep up with training. `fingerprint` is a digest of the images and
    their classes. `origin` is what made the codes, where these stand for images: items are then (codes int64, label).
    """

    train: Images
    held_out: Images
    labels: tuple[str, ...]
    fingerprint: str
    workers: int = 0
    origin: "Origin | None" = None


def open_data(name: str, resolution: int, held_out: Path | None = None, recipe: Recipe | None = None) -> Data:
    """The data behind `--data`: `digits`, `photos`, a folder of codes, or an image folder with a subfolder a class.

    Args:
        name: The data.
        resolution: Height and width of the images in pixels.
        held_out: An image folder of the same classes to measure on, in place of a tenth of an image folder.
        recipe: How images of a folder are augmented; by default as `Recipe` says.

    Raises:
        VqdeployError: There is no such data, its classes are ambiguous, or it needs a package.
        ArtifactError: Images or codes are damaged.
    """
    if not name:
        raise VqdeployError("there is no such data", expected="digits, photos or a folder", found="no name")
    try:
        holds_codes = name not in NAMED and any(Path(name).glob("*.parquet"))
        if held_out is not None and (name in NAMED or holds_codes):
            raise VqdeployError(
                "only an image folder can have other held-out images", expected="no --held-out", found=held_out
            )
        if name in NAMED:
            return NAMED[name](resolution)
        return _codes(Path(name)) if holds_codes else _folder(Path(name), resolution, held_out, recipe or Recipe())
    except ImportError as error:
        raise missing(error.name or str(error)) from error


class Digits(Images):
    """Scikit-learn's handwritten digits of 8x8 pixels, upsampled; augmented by rotation, scaling and shifts."""

    MARGIN = 1  # pixels of the 8x8 original left free around the digit

    def __init__(self, digits: np.ndarray, labels: np.ndarray, resolution: int):
        self.digits = [ImageOps.expand(Image.fromarray(digit), 8) for digit in digits]
        self.labels, self.resolution = labels.tolist(), resolution

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """A digit and its label; rotated, scaled and shifted with `rng`."""
        angle, zoom, x, y = rng.uniform(-1, 1, 4).tolist() if rng else (0.0, 0.0, 0.0, 0.0)
        turn, digit = 0.18 * angle, self.digits[index]
        step = (8 + 2 * self.MARGIN) / self.resolution * (1 + 0.12 * zoom)
        cos, sin = step * np.cos(turn), step * np.sin(turn)
        half, centre = self.resolution / 2, digit.width / 2
        to_source = (
            *(cos, -sin, centre + 0.7 * x - half * (cos - sin)),
            *(sin, cos, centre + 0.7 * y - half * (sin + cos)),
        )
        size = (self.resolution, self.resolution)
        image = digit.transform(size, Image.Transform.AFFINE, to_source, resample=_CUBIC)
        return _tensor(image), self.labels[index]


def _digits(resolution: int) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = np.minimum(source.images * 16, 255).astype(np.uint8)
    split = train_test_split(images, source.target, test_size=0.2, random_state=0, stratify=source.target)
    train, held_out, train_labels, held_out_labels = split
    return Data(
        Digits(train, train_labels, resolution),
        Digits(held_out, held_out_labels, resolution),
        tuple(map(str, source.target_names)),
        hashlib.sha256(images.tobytes()).hexdigest(),
    )


class Crops(Images):
    """Square crops of a few large images, randomly mirrored; the label is the index of the image.

    There are `length` crops. Without `rng` a crop depends on its index only.
    """

    def __init__(self, images: list[Image.Image], resolution: int, length: int):
        self.images, self.resolution, self.length = images, resolution, length

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """A crop and the index of its photograph."""
        label = index % len(self.images)
        share, x, y, mirror = (rng or np.random.default_rng(index)).random(4).tolist()
        image = square(self.images[label], self.resolution, 0.3 + 0.7 * share, x, y)
        return _tensor(ImageOps.mirror(image) if mirror < 0.5 else image), label


def _photos(resolution: int) -> Data:
    """Photographs that come with scikit-image and scikit-learn. The right fifth of each is held out."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    samples = load_sample_images()
    photographs |= {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    left, right = [], []
    for photograph in photographs.values():
        border = photograph.shape[1] * 4 // 5
        left.append(Image.fromarray(photograph[:, :border]))
        right.append(Image.fromarray(photograph[:, border:]))
    return Data(
        Crops(left, resolution, length=4096),
        Crops(right, resolution, length=256),
        tuple(photographs),
        hashlib.sha256(b"".join(photograph.tobytes() for photograph in photographs.values())).hexdigest(),
    )


NAMED: dict[str, Callable[[int], Data]] = {"digits": _digits, "photos": _photos}
"""Data that come with packages, by name."""


class Files(Images):
    """Image files, cropped square and resized; augmented by random crops and mirroring, as the recipe says.

    Held-out images are cropped as in `vqdeploy run`.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], resolution: int, recipe: Recipe):
        self.files, self.resolution, self.recipe = files, resolution, recipe
        classes = defaultdict(list)
        for index, (_, label) in enumerate(files):
            classes[label].append(index)
        self.classes = list(classes.values())

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, rng: np.random.Generator) -> int:
        """The index of an image; as often of one class as of another, if the recipe is balanced."""
        if not self.recipe.balanced:
            return super().draw(rng)
        members = self.classes[rng.integers(len(self.classes))]
        return members[rng.integers(len(members))]

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """An image and its class; cropped and mirrored at random with `rng`."""
        path, label = self.files[index]
        image = open_image(path)
        if rng is None:
            return _tensor(square(image, self.resolution)), label
        share, x, y, mirror = rng.random(4).tolist()
        smallest = self.recipe.smallest_crop
        image = square(image, self.resolution, smallest + (1 - smallest) * share, x, y)
        return _tensor(ImageOps.mirror(image) if self.recipe.mirror and mirror < 0.5 else image), label


class Codes(Images):
    """Images that are codes already, and so cannot be augmented."""

    def __init__(self, codes: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], indices: Sequence[int]):
        self.codes, self.labels, self.shape, self.indices = codes, labels, shape, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """The codes int64 [*shape] of an image, and its class."""
        row = self.indices[index]
        return torch.from_numpy(self.codes[row].astype(np.int64)).view(self.shape), int(self.labels[row])


def _codes(folder: Path) -> Data:
    """A folder of codes; a tenth of each class is held out."""
    from vqdeploy import shards

    found = shards.read(folder)
    train, held_out = _split([(row, label) for row, label in enumerate(found.labels.tolist())])
    if not held_out:
        raise VqdeployError(f"{folder} holds too few images", expected="2 or more in one of its classes", found=1)
    maps = found.origin.maps
    shape = maps[0] if len(maps) == 1 else (found.origin.length,)

    def part(rows: list[tuple[int, int]]) -> Codes:
        return Codes(found.codes, found.labels, shape, [row for row, _ in rows])

    return Data(part(train), part(held_out), found.classes, found.fingerprint, origin=found.origin)


def _folder(folder: Path, resolution: int, held_out: Path | None, recipe: Recipe) -> Data:
    """An image folder; a tenth of each class is held out, if there is no folder for that."""
    classes, train = _listed(folder)
    if held_out is None and len(train) < 2:
        raise VqdeployError(f"{folder} holds too few images", expected="2 or more", found=len(train))
    fingerprint = _read([path for path, _ in train], folder)
    if held_out is None:
        train, rest = _split(train)
    else:
        others, rest = _listed(held_out)
        if others != classes:
            expected, found = (", ".join(names) or "none" for names in (classes, others))
            raise VqdeployError(f"{held_out} has other classes than {folder}", expected=expected, found=found)
        fingerprint = hashlib.sha256((fingerprint + _read([path for path, _ in rest], held_out)).encode()).hexdigest()
    if not rest:
        raise VqdeployError(f"{folder} holds too few images", expected="2 or more in one of its classes", found=1)
    workers = min(cores(), 8) if resolution > 64 else 0
    return Data(Files(train, resolution, recipe), Files(rest, resolution, recipe), classes, fingerprint, workers)


def _listed(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The names of the classes of an image folder, and its images with their labels."""
    if not folder.is_dir():
        raise VqdeployError("there is no such data", expected="digits, photos, an image folder or codes", found=folder)
    return find_labelled(folder)


def _read(files: list[Path], folder: Path) -> str:
    """Reads every image, to find damaged ones before training, and returns a digest of their paths and contents."""
    log.info("reading %d images in %s", len(files), folder)
    total = hashlib.sha256()
    damaged = []
    with ThreadPool(cores()) as pool:
        for file, (digest, damage) in zip(files, pool.imap(_digest, files, chunksize=16), strict=True):
            total.update(os.fsencode(file.relative_to(folder)) + b"\0" + digest)
            if damage is not None:
                damaged.append(damage)
    for text in damaged:
        log.info("%s", text)
    if len(damaged) == 1:
        raise ArtifactError(damaged[0].removesuffix("."), fix="remove it")
    if damaged:
        texts = [text.removesuffix(".") for text in damaged]
        raise ArtifactError(
            f"{len(damaged)} of {len(files)} images in {folder} cannot be read: {shortened(texts)}",
            fix="remove them; vqdeploy -v train names all",
        )
    return total.hexdigest()


def _digest(file: Path) -> tuple[bytes, str | None]:
    """The sha256 of an image file, and why it cannot be read."""
    try:
        open_image(file)
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest(), None
    except (VqdeployError, OSError) as error:
        return b"", str(error)


def _split(files: list[tuple[T, int]]) -> tuple[list[tuple[T, int]], list[tuple[T, int]]]:
    """Holds out a tenth of each class, in a fixed random order: at least one image, but never the only one."""
    classes = defaultdict(list)
    for file in files:
        classes[file[1]].append(file)
    generator = torch.Generator().manual_seed(0)
    train, held_out = [], []
    for found in classes.values():
        order = torch.randperm(len(found), generator=generator).tolist()
        count = max(len(found) // 10, int(len(found) > 1))
        held_out += [found[i] for i in order[:count]]
        train += [found[i] for i in order[count:]]
    return train, held_out


def _tensor(image: Image.Image) -> Tensor:
    return channels_first(torch.from_numpy(np.array(image.convert("RGB")))).contiguous()


def images_of(dataset: Images, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
    """All images uint8 [N, 3, R, R] of a dataset and their labels [N]; augmented with `rng`."""
    items = [dataset.item(i, rng) if rng else dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
