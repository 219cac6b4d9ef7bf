"""How many images a second become codes: `vqdeploy tokenize` against a loop over PyTorch's DataLoader.

python tools/tokenize_speed.py --model rqvae --preset bench --images 96

Both read the same JPEG files, crop and resize them alike, and write the codes. They take turns, each in a process of
its own whose start counts, and the fastest turn of each is shown. The loop is tried with and without loader processes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vqdeploy import checkpoint, machine
from vqdeploy.engines.build import build
from vqdeploy.export.package import export
from vqdeploy.models.pixels import to_range
from vqdeploy.runtime.folder import find_images
from vqdeploy.runtime.images import square
from vqdeploy.runtime.threads import cores
from vqdeploy.training.data import Files

BATCH = 8  # of the loop: larger ones are no faster on a CPU
SIZE = (500, 375)  # of the files in pixels, as usual in ImageNet


def write_images(folder: Path, count: int) -> None:
    """JPEG files of crops of photographs."""
    from skimage import data

    photographs = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        share, x, y = rng.uniform((0.5, 0, 0), 1).tolist()
        image = square(photographs[i % 4], SIZE[0], share, x, y).crop((0, 0, *SIZE))
        image.save(folder / f"{i:05}.jpg", quality=90)


@torch.inference_mode()
def loop(model: str, preset: str, folder: Path, output: Path, workers: int) -> None:
    """What people write by hand: a DataLoader, the tokenizer in eager PyTorch, and the codes into one file."""
    torch.set_num_threads(cores())
    tokenizer = checkpoint.default(model, preset).tokenizer
    images = Files([(file, 0) for file in find_images(folder)], tokenizer.config.resolution)
    pixel_range = tokenizer.config.pixel_range
    batches = DataLoader(images, BATCH, num_workers=workers)
    codes = [tokenizer.encode(to_range(batch, pixel_range)).numpy() for batch, _ in batches]
    np.savez(output, codes=np.concatenate(codes))


def main() -> None:
    """Prints the rates of all as JSON, and those of the turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rqvae")
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--loop", nargs=3, metavar=("FOLDER", "OUTPUT", "WORKERS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        folder, output, workers = given.loop
        loop(given.model, given.preset, Path(folder), Path(output), int(workers))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root / "images", given.images)
        export(checkpoint.default(given.model, given.preset), root / "package")
        build(root / "package", root / "a.plan")
        images, codes = str(root / "images"), str(root / "codes")
        again = [sys.executable, __file__, "--model", given.model, "--preset", given.preset, "--loop", images]
        tokenize = [sys.executable, "-m", "vqdeploy", "tokenize", "--engine", str(root / "a.plan"), "--input", images]
        lines = {
            "tokenize": [*tokenize, "-o", codes, "--shard-size", str(BATCH)],
            "loop": [*again, f"{codes}.npz", "0"],
            f"loop, {cores()} loader processes": [*again, f"{codes}.npz", str(cores())],
        }
        rates: dict[str, list[float]] = {what: [] for what in lines}
        for _ in range(given.turns):
            for what, line in lines.items():
                shutil.rmtree(codes, ignore_errors=True)
                start = time.perf_counter()
                subprocess.run(line, check=True, capture_output=True)  # noqa: S603
                rates[what].append(round(given.images / (time.perf_counter() - start), 3))
        best = {what: max(turns) for what, turns in rates.items()}
        fastest = max(rate for what, rate in best.items() if what != "tokenize")
        result = {"cpu": machine.cpu(), "cores": cores(), "images_per_second": best, "turns": rates}
        print(json.dumps({**result, "times_faster": round(best["tokenize"] / fastest, 2)}, indent=2))


if __name__ == "__main__":
    main()
