import pytest
from support.data import CLASSES, png

from vqdeploy.runtime.images import read_bytes
from vqdeploy.tokenize import run
from vqdeploy.tokenize.part import tokenize_part


@pytest.fixture
def inline(monkeypatch):
    """Parts run in this process."""
    monkeypatch.setattr(run, "_locally", lambda job, parts, workers: (tokenize_part(job, part, 1) for part in parts))


@pytest.fixture
def folder(tmp_path):
    """An image folder of ten images in two classes: image i is `png(i)`."""
    for i in range(10):
        path = tmp_path / "in" / CLASSES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / "in"


@pytest.fixture
def expected(pipeline):
    """The codes that `Pipeline.encode` gives image i, as a flat list."""

    def codes(number):
        image = read_bytes(png(number), "image", *pipeline.image_shape[:2])
        return pipeline.encode(image[None])[0].reshape(-1).tolist()

    return codes
