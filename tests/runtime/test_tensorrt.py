"""Sessions on TensorRT: the loops, buffers, contexts and CUDA graphs, on a simulated GPU and with simulated engines."""

import sys

import numpy as np
import onnx
import pytest
from late_cuda import Cuda, TensorRT

from vqdeploy.engines import tensorrt as builder
from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import device, load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.verify import verify

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
SYSTEMS = ("", "movq", "adaptive", "vit", "vqgan", "vqvae2", "three")


def named(system, kind):
    return f"{system}_{kind}".lstrip("_")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU with its libraries."""
    cuda = Cuda()
    monkeypatch.setattr(device, "cudart", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(rtx, cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cuda


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Builds a plan whose engines are those that the simulation runs."""

    def build_stage(backend, stage, package, folder, sizes, plugin=False):
        target = folder / f"{stage.name}.engine"
        target.write_bytes(onnx.load(package / stage.file).SerializeToString())
        return target

    def make(package, backend="tensorrt-rtx", **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "build_stage", build_stage)
            file = tmp_path_factory.mktemp("plan") / "engines.plan"
            build(package, file, backend=backend, **options)
        return file

    return make


@pytest.fixture(scope="module", params=SYSTEMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def engines(name, request, simulated):
    return simulated(request.getfixturevalue(named(name, "package")))


@pytest.fixture(scope="module")
def small_engines(package, simulated):
    return simulated(package)


def codes_of(pipeline):
    """What the loops draw: all of it, twice, and the rest of what is known, which is not the same in each image."""
    labels = [i % pipeline.classes for i in range(3)]
    first = pipeline.generate(labels, seed=4)
    pipeline.generate(labels[:2], seed=5)
    again = pipeline.generate(labels, seed=4)
    np.testing.assert_array_equal(first.codes, again.codes)
    masks = np.arange(pipeline.side)[:, None] >= np.array([0.3, 0.9, 0.6])[:, None, None] * pipeline.side
    masks = np.broadcast_to(masks, (3, pipeline.side, pipeline.side))
    rest = pipeline.inpaint(first.images, labels, mask=masks, seed=6)
    return [first.codes, first.images, rest.codes]


def test_loops_draw_what_they_draw_on_the_cpu(engines, name, request, gpu, tmp_path):
    portable = tmp_path / "portable.plan"
    build(request.getfixturevalue(named(name, "package")), portable, portable=True)
    expected = codes_of(load(portable, threads=1))
    for a, b in zip(codes_of(load(engines)), expected, strict=True):
        np.testing.assert_array_equal(a, b)
