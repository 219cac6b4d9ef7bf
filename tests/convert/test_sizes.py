"""Tokenizers of convolutions at sizes that their configuration does not name."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.public import write_tokenizer

from vqdeploy import checkpoint
from vqdeploy.cli.export import parse_size
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.export.package import export
from vqdeploy.export.tokenizer import maps_of
from vqdeploy.runtime import load
from vqdeploy.runtime.images import read
from vqdeploy.systems import create, preset
from vqdeploy.verify import verify


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("512", (512, 512)), ("384x640", (384, 640)), ("8X16", (8, 16))]
)
def test_sizes_as_they_are_typed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "12x", "1x2x3", "-8", "0", "8.5", "99999999", "²"])
def test_malformed_sizes(text):
    with pytest.raises(VqdeployError, match="--image-size is malformed; expected 512 or 384x640"):
        parse_size(text)


def test_maps_of_codes_follow_the_size():
    with torch.device("meta"):
        movq, vit, levels = (create(preset(name, "tiny")).tokenizer for name in ("movq", "vitvqgan", "vqvae2"))
    assert maps_of(movq, (32, 32)) == ((8, 8, 4),)
    assert maps_of(movq, (64, 20)) == ((16, 5, 4),)
    for size in ((30, 32), (32, 2), (0, 4)):
        with pytest.raises(VqdeployError, match="a height and a width that 4 divides"):
            maps_of(movq, size)
    assert len(maps_of(levels, (32, 32))) == 2
    for tokenizer in (vit, levels):
        with pytest.raises(VqdeployError, match="takes images of one size; expected 32x32, found 64x64"):
            maps_of(tokenizer, (64, 64))


def test_a_prior_has_one_size(artifacts, tmp_path):
    with pytest.raises(VqdeployError, match="codes of images of one size; expected 16x16, found 32x32"):
        export(artifacts.system("movq"), tmp_path / "package", image_size=(32, 32))
    assert not (tmp_path / "package").exists()


def test_files_are_cut_to_the_shape_of_the_plan(tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 45:55] = 255  # in the middle, which stays there
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read(tmp_path / "wide.png", 20).shape == (20, 20, 3)
    tall = read(tmp_path / "wide.png", 40, 20)
    assert tall.shape == (40, 20, 3)
    assert tall[:, 6:14].min() > 200
    assert tall[:, :3].max() < 50


@pytest.mark.slow
def test_an_oblong_plan(tmp_path):
    _, file, _, config = write_tokenizer("taming_vqgan_f8_attn", tmp_path)
    import_checkpoint(tmp_path / "checkpoint", file, tokenizer_config=config)
    system = checkpoint.load(tmp_path / "checkpoint")
    export(system, tmp_path / "package", image_size=(32, 48))
    build(tmp_path / "package", tmp_path / "plan")
    pipeline = load(tmp_path / "plan", threads=1)
    assert (pipeline.image_shape, pipeline.grid) == ((32, 48, 3), (8, 12, 1))
    assert pipeline.reconstruct(np.zeros((1, 32, 48, 3), np.uint8)).shape == (1, 32, 48, 3)
    assert verify(tmp_path / "plan", system)["passed"]
    with pytest.raises(VqdeployError, match=r"does not ship\. Fix: add --checkpoint FOLDER"):
        verify(tmp_path / "plan")
