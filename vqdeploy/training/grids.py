"""Sheets of images as PNG."""

from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def write_grid(images: Tensor, path: Path, gap: int = 2) -> None:
    """Writes images uint8 [rows, columns, 3, R, R] as one PNG, with white lines between them."""
    framed = F.pad(images, (0, gap, 0, gap), value=255)
    sheet = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * (R + gap), columns * (R + gap), 3]
    Image.fromarray(sheet[:-gap, :-gap].numpy()).save(path)
