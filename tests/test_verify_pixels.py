"""`verify` finds graphs that read or write pixels wrongly, although their weights are right."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.systems import SMALL, lively

from vqdeploy import checkpoint
from vqdeploy.export import layers
from vqdeploy.export.package import export
from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8
from vqdeploy.systems import SYSTEMS
from vqdeploy.verify import verify_package
from vqdeploy.verify.tokenizer import check_tokenizer

pytestmark = pytest.mark.slow

MUTANTS = {
    "red and blue": lambda images: images[..., ::-1],
    "rows and columns": lambda images: images.swapaxes(1, 2),
    "upside down": lambda images: images[:, ::-1],
    "left and right": lambda images: images[:, :, ::-1],
    "a negative": lambda images: 255 - images,
}


def test_an_export_that_swaps_colours_and_axes(tmp_path, monkeypatch):
    """All exported graphs are wrong in the same way; PyTorch is not."""
    read, write = layers.ImageInput.forward, layers.ImageOutput.forward
    monkeypatch.setattr(layers.ImageInput, "forward", lambda self, x: read(self, x).flip(1).transpose(2, 3))
    monkeypatch.setattr(layers.ImageOutput, "forward", lambda self, x: write(self, x.transpose(2, 3).flip(1)))
    system = lively(replace(SMALL, prior=None))
    export(system, tmp_path / "onnx")
    report = verify_package(tmp_path / "onnx", system)
    assert not report["passed"]
    failed = {check["metric"] for check in report["checks"] if not check["passed"]}
    assert {"codes outside the margin rule", "largest difference in grey levels"} <= failed


class TokenizerOfAPlan:
    """A plan's tokenizer in PyTorch, whose images go through `reads` on their way in, and through `writes` out."""

    def __init__(self, system, reads=np.asarray, writes=np.asarray):
        self.model, self.reads, self.writes = system.tokenizer, reads, writes
        self.tokenizer = SimpleNamespace(omits_depths=False)
        stages = [SimpleNamespace(name=name, precision="fp32") for name in ("encode", "decode")]
        self.manifest, self.range = SimpleNamespace(stages=stages), system.tokenizer.config.pixel_range
        self.codebook_size, self.image_shape = system.config.tokenizer.codebook_size, (32, 32, 3)
        self.grid = tuple(self.encode(np.zeros((1, *self.image_shape), np.uint8)).shape[1:])

    def encode(self, images):
        images = torch.from_numpy(np.ascontiguousarray(self.reads(images)))
        return self.model.encode(to_range(channels_first(images), self.range)).numpy()

    def decode(self, codes):
        images = to_uint8(self.model.decode(torch.from_numpy(codes)), self.range)
        return np.ascontiguousarray(self.writes(channels_last(images).numpy()))


TRAINED = [model for model in SYSTEMS if (checkpoint.SHIPPED / model).is_dir()]  # random weights tell no colours apart


@pytest.fixture(scope="module", params=TRAINED)
def shipped(request):
    return checkpoint.default(request.param)


def failed(system, **change):
    with torch.no_grad():
        checks = check_tokenizer(TokenizerOfAPlan(system, **change), system, np.random.default_rng(0))
    return {check.stage for check in checks if not check.passed}


def test_no_symmetry_leaves_the_images_of_verify_alone(shipped):
    """The shipped weights have seen grey digits alone: what `verify` looks at has to be more than that."""
    assert failed(shipped) == set()
    for name, mutant in MUTANTS.items():
        assert failed(shipped, reads=mutant) == {"encode"}, name
        assert failed(shipped, writes=mutant) == {"decode"}, name
