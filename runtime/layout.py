"""Array layout of the codes of an image: one map [h, w, Q], or the maps of several levels concatenated [N]."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.arguments import as_array
from vqdeploy.runtime.noise import gumbel

_COARSEST = 3  # positions of a map that no mask cuts
_MASK_DRAW = 2**32  # draw index of the noise for random masks, far above that of any step


@dataclass(frozen=True)
class Layout:
    """The code maps of an image.

    Attributes:
        maps: Height, width and depth Q of each code map, coarse to fine.
    """

    maps: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes of one image: [h, w, Q] of a single map, else the total number of codes [N]."""
        return self.maps[0] if len(self.maps) == 1 else (sum(map(math.prod, self.maps)),)

    @property
    def depth(self) -> int:
        """How many values a per-depth sampling option has: one per depth of a single map, else one per map."""
        return self.maps[0][2] if len(self.maps) == 1 else len(self.maps)

    def check(self, codes: object, size: int, lowest: int = 0) -> np.ndarray:
        """Codes [B, *shape] in `lowest`..`size` - 1, as int64.

        Raises:
            VqdeployError: They have another shape or type, or are out of range.
        """
        array = as_array("codes", codes)
        if array.ndim != 1 + len(self.shape) or array.shape[1:] != self.shape or array.dtype.kind not in "iu":
            raise VqdeployError(
                "codes have the wrong shape or type",
                expected=f"integers [B, {', '.join(map(str, self.shape))}]",
                found=f"{array.dtype} {list(array.shape)}",
            )
        if array.size and not lowest <= array.min() <= array.max() < size:
            found = f"{array.min()}..{array.max()}"
            raise VqdeployError("codes are out of range", expected=f"{lowest}..{size - 1}", found=found)
        return array.astype(np.int64)

    def split(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes [B, *shape] -> each map [B, h, w, Q]."""
        ends = np.cumsum([math.prod(each) for each in self.maps])
        parts = np.split(codes.reshape(len(codes), -1), ends[:-1], 1)
        return [part.reshape(-1, *each) for part, each in zip(parts, self.maps, strict=True)]

    def join(self, maps: Iterable[np.ndarray]) -> np.ndarray:
        """Each map [B, h, w, Q] -> codes [B, *shape]."""
        joined = np.concatenate([part.reshape(len(part), -1) for part in maps], 1)
        return joined.reshape(-1, *self.shape)

    def first(self, codes: np.ndarray, depth: int) -> np.ndarray:
        """Codes [B, *shape] with -1 for all but the first depths, or maps where there are several."""
        if len(self.maps) == 1:
            return np.where(np.arange(self.depth) < depth, codes, -1)
        count = sum(map(math.prod, self.maps[:depth]))
        return np.where(np.arange(codes.shape[1]) < count, codes, -1)

    def enlarged(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes [B, *shape] -> each map, upsampled to the size of the last."""
        maps = self.split(codes)
        height, width = maps[-1].shape[1:3]
        return [part[:, _nearest(part.shape[1], height)][:, :, _nearest(part.shape[2], width)] for part in maps]

    def unsettled(self, codes: np.ndarray) -> np.ndarray:
        """Where codes [B, *shape] of a preview are not final, bool [B, h, w, Q] at the size of the last map."""
        *coarser, unsettled = self.enlarged(codes < 0)
        for level in reversed(coarser):  # a level starts only after the one above it is done
            unsettled = np.where(level.any((1, 2, 3), keepdims=True), level, unsettled)
        return unsettled

    def masked(self, mask: np.ndarray, raster: bool) -> np.ndarray:
        """The codes to draw, bool [B, *shape], for unknown pixels bool [B, H, W].

        With `raster`, for priors that draw in raster order: in each map all rows from the first that the mask touches.
        Else the cells that it touches or, of maps that are summed, those that it covers to a half at their centre.
        """
        if raster:
            cells = [_from_first_row(cells_of(mask, *each[:2])) for each in self.maps]
        elif len(self.maps) == 1:
            cells = [cells_of(mask, *each[:2]) for each in self.maps]
        else:
            cells = [centres_of(mask, *each[:2]) for each in self.maps]
        return self.join(np.repeat(part[..., None], each[2], -1) for part, each in zip(cells, self.maps, strict=True))

    def share(self, ratio: float, raster: bool, images: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
        """A random fraction of the codes of each image, bool [B, *shape], determined by the seed.

        With `raster` the bottom rows of each map instead.
        """
        if raster:
            rows = (np.arange(each[0]) >= int(each[0] * (1 - ratio) + 1e-9) for each in self.maps)
            maps = (np.broadcast_to(r[None, :, None, None], (1, *m)) for r, m in zip(rows, self.maps, strict=True))
            return np.repeat(self.join(maps), len(images), 0)
        noise = np.empty((len(images), math.prod(self.shape)), np.float32)
        gumbel([(seed, int(image), _MASK_DRAW) for image in images], noise)
        ranks = noise.argsort(1).argsort(1)
        chosen: np.ndarray = ranks < round(ratio * ranks.shape[1])
        return chosen.reshape(-1, *self.shape)


def cells_of(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The grid cells, bool [B, height, width], that a pixel mask bool [B, H, W] touches."""
    pixels = mask.reshape(len(mask), height, mask.shape[1] // height, width, -1)
    touched: np.ndarray = np.logical_or.reduce(pixels, (2, 4))
    return touched


def centres_of(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The grid cells, bool [B, height, width], of which half the pixels around the centre are in a mask bool [B, H, W].

    As VAR's public code scales masks, bilinearly. It keeps its coarsest map in any case; so it is here, unless the mask
    covers the image.
    """
    rows, columns = (_centre_weights(*sizes) for sizes in ((height, mask.shape[1]), (width, mask.shape[2])))
    cells: np.ndarray = rows @ mask.astype(np.float64) @ columns.T >= 0.5
    if height * width <= _COARSEST:
        cells &= mask.all((1, 2), keepdims=True)
    return cells


def _centre_weights(size: int, whole: int) -> np.ndarray:
    """Weights float64 [size, whole] of the two pixels around the centre of each cell."""
    centres = (np.arange(size) + 0.5) * whole / size - 0.5
    weights: np.ndarray = np.maximum(1 - np.abs(centres[:, None] - np.arange(whole)), 0)
    return weights


def _nearest(size: int, whole: int) -> np.ndarray:
    """The cell of a row of `size` at each of `whole` positions, int64 [whole]."""
    return np.arange(whole) * size // whole


def _from_first_row(cells: np.ndarray) -> np.ndarray:
    rows = np.maximum.accumulate(cells.any(2), axis=1)
    return np.broadcast_to(rows[:, :, None], cells.shape)
