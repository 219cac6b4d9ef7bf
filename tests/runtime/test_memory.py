"""What stays in memory of a plan, and when."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import WEIGHTS

pytestmark = pytest.mark.slow

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="the pages of a map are listed by Linux")


def resident(path):
    """Kilobytes of the maps of a file that are in the memory of this process."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if "-" in word and not word.endswith(":"):
            inside = bool(rest) and rest[-1] == str(path)
        elif inside and word == "Rss:":
            size += int(rest[0])
    return size


@needs_proc
def test_pages_of_weights_are_returned_while_they_are_read(plan):
    bundle = Bundle(plan)
    with bundle.sparing_memory():
        weights = np.frombuffer(bundle.member(WEIGHTS), np.uint8)
        total = int(weights.sum())
        end = time.monotonic() + 30
        while resident(plan) > 100 and time.monotonic() < end:
            time.sleep(0.01)
        assert resident(plan) <= 100
    assert int(weights.sum()) == total
    assert resident(plan) > 100


@needs_proc
def test_a_session_leaves_none_behind(plan):
    pipeline = load(plan, threads=1)
    pipeline.session("step")
    assert resident(plan) == 0


def test_pages_are_returned_when_the_block_fails(plan):
    with pytest.raises(ZeroDivisionError), Bundle(plan).sparing_memory():
        _ = 1 / 0


@pytest.mark.parametrize("name", ["", "movq_", "vqvae2_"])
def test_stages_that_are_closed_make_the_same_images(name, request):
    pipeline, plan = (request.getfixturevalue(name + kind) for kind in ("pipeline", "plan"))
    images = np.random.default_rng(0).integers(0, 256, (2, *pipeline.image_shape), np.uint8)
    once = load(plan, threads=1, keep=False)
    for _ in range(2):
        for make in (
            lambda pipe: pipe.generate([0, 1], seed=5),
            lambda pipe: pipe.inpaint(images, [0, 1], mask_ratio=0.5, seed=5),
        ):
            found, expected = make(once), make(pipeline)
            np.testing.assert_array_equal(found.codes, expected.codes)
            np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(once.reconstruct(images), pipeline.reconstruct(images))


def test_the_prior_is_closed_before_the_decoder_opens(plan, monkeypatch):
    pipeline = load(plan, threads=1, keep=False)
    opened = pipeline._sessions._opened
    found = []
    original = pipeline.decode

    def note(codes):
        found.append(sorted(opened))
        return original(codes)

    monkeypatch.setattr(pipeline, "decode", note)
    pipeline.generate([0], callback=lambda step: found.append(sorted(opened)) if step.step == 1 else None)
    assert found == [["step"], []]
    assert sorted(opened) == ["decode"]


def test_stages_stay_open_otherwise(plan):
    pipeline = load(plan, threads=1)
    pipeline.generate([0])
    assert sorted(pipeline._sessions._opened) == ["decode", "step"]
