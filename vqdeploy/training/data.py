"""Images to train on, as pairs of uint8 [3, R, R] and a label, with a fixed part held out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vqdeploy.errors import VqdeployError

Item = tuple[Tensor, int]
_CUBIC = Image.Resampling.BICUBIC
_LANCZOS = Image.Resampling.LANCZOS


class Images(Dataset[Item]):
    """A dataset of known length."""

    def __len__(self) -> int:
        raise NotImplementedError


class Data(NamedTuple):
    """`labels` names the classes and is empty when there are none; the label of every image is then 0.

    `workers` is the number of processes that it takes to load the images as fast as they are needed.
    """

    train: Images
    held_out: Images
    labels: tuple[str, ...]
    workers: int = 0


def open_data(name: str, resolution: int) -> Data:
    """The data behind `--data`: `digits`, `photos` or an image folder, whose subfolders are the classes.

    Raises:
        VqdeployError: There is no such data, it holds no images, or one of them is damaged.
    """
    named: dict[str, Callable[[int], Data]] = {"digits": _digits, "photos": _photos}
    try:
        return named[name](resolution) if name in named else _folder(Path(name), resolution)
    except ImportError as error:
        raise VqdeployError(
            f"the data {name!r} needs the package {error.name}", fix="pip install 'vqdeploy[train]'"
        ) from error


class Digits(Images):
    """Scikit-learn's handwritten digits of 8x8 pixels, enlarged; turned, scaled and shifted a little in training."""

    MARGIN = 1  # pixels of the 8x8 original left free around the digit

    def __init__(self, digits: np.ndarray, labels: np.ndarray, resolution: int, augment: bool):
        self.digits = [ImageOps.expand(Image.fromarray(digit), 8) for digit in digits]
        self.labels, self.resolution, self.augment = labels.tolist(), resolution, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        angle, zoom, x, y = ((2 * torch.rand(4) - 1) * self.augment).tolist()
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
        Digits(train, train_labels, resolution, augment=True),
        Digits(held_out, held_out_labels, resolution, augment=False),
        tuple(map(str, source.target_names)),
    )


class Crops(Images):
    """Square crops of a few large images, mirrored at random; the label is the image.

    An epoch has `length` crops. The crops are new each time, or with `fixed` the same for the same index.
    """

    def __init__(self, images: list[Image.Image], resolution: int, length: int, fixed: bool):
        self.images, self.resolution, self.length, self.fixed = images, resolution, length, fixed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        label = index % len(self.images)
        generator = torch.Generator().manual_seed(index) if self.fixed else None
        share, x, y, mirror = torch.rand(4, generator=generator).tolist()
        image = _crop(self.images[label], 0.3 + 0.7 * share, x, y, self.resolution)
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
        Crops(left, resolution, length=4096, fixed=False),
        Crops(right, resolution, length=256, fixed=True),
        tuple(photographs),
    )


class Files(Images):
    """Image files, cut square and resized; in training a random part of 75 to 100 % of the side, mirrored at random."""

    def __init__(self, files: list[tuple[Path, int]], resolution: int, augment: bool):
        self.files, self.resolution, self.augment = files, resolution, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise VqdeployError(f"{path} is a damaged image ({error})") from error
        share, x, y, mirror = torch.rand(4).tolist() if self.augment else (1, 0.5, 0.5, 1)
        image = _crop(image, 0.75 + 0.25 * share, x, y, self.resolution)
        return _tensor(ImageOps.mirror(image) if mirror < 0.5 else image), label


def _folder(folder: Path, resolution: int) -> Data:
    """An image folder. One image in ten is held out."""
    if not folder.is_dir():
        raise VqdeployError("there is no such data", expected="digits, photos or an image folder", found=folder)
    labels = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and _images(path)))
    files = [(path, label) for label, name in enumerate(labels) for path in _images(folder / name)]
    files = files or [(path, 0) for path in _images(folder)]
    if len(files) < 2:
        raise VqdeployError(f"{folder} holds too few images", expected="2 or more", found=len(files))
    for path, _ in files:
        _check(path)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(len(files) // 10, 1)
    return Data(
        Files([files[i] for i in order[held_out:]], resolution, augment=True),
        Files([files[i] for i in order[:held_out]], resolution, augment=False),
        labels,
        min(os.cpu_count() or 1, 8) if resolution > 64 else 0,
    )


def _images(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in known)


def _check(path: Path) -> None:
    """Reads the header alone, so that a bad file among many is found before training and not hours into it."""
    try:
        Image.open(path).close()
    except (UnidentifiedImageError, OSError) as error:
        raise VqdeployError(f"{path} is not an image that can be read") from error


def _crop(image: Image.Image, share: float, x: float, y: float, resolution: int) -> Image.Image:
    """A square whose side is a share of the shorter side, at a relative place, resized."""
    side = share * min(image.size)
    left, top = x * (image.width - side), y * (image.height - side)
    return image.resize((resolution, resolution), _LANCZOS, box=(left, top, left + side, top + side))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_range(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images uint8 -> float in the range of a model."""
    low, high = pixel_range
    return images.float() / 255 * (high - low) + low


def to_uint8(images: Tensor, pixel_range: tuple[float, ...]) -> Tensor:
    """Images in the range of a model -> uint8, rounded."""
    low, high = pixel_range
    return ((images.float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)


def images_of(dataset: Images) -> tuple[Tensor, Tensor]:
    """All images [N, 3, R, R] of a dataset, and their labels [N]."""
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
