"""Images from 5 % of their codes, as in the appendix of the MoVQ paper.

    python examples/masked_reconstruction.py movq.plan examples/digits masked.png

Rows: what is known of each image; the likeliest codes, drawn in one step; two completions in eight steps each; the
images. Labels are not given.
"""

import sys
from pathlib import Path

import numpy as np

from vqdeploy.runtime import load
from vqdeploy.runtime.images import read, veil, write_grid


def main(plan: str, folder: str, output: str, ratio: str = "0.95") -> None:
    """Writes the figure."""
    pipe = load(plan)
    images = np.stack([read(path, pipe.image_shape[0]) for path in sorted(Path(folder).iterdir())])
    share = {"mask_ratio": float(ratio)}
    rows = [
        veil(images, pipe.unknown(len(images), **share)),
        pipe.inpaint(images, **share, steps=1, top_k=1).images,
        pipe.inpaint(images, **share, steps=8, completions=2).images,
        images,
    ]
    write_grid(Path(output), np.concatenate(rows), columns=len(images), note=share)


if __name__ == "__main__":
    main(*sys.argv[1:])
