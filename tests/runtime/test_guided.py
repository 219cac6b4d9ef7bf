"""Sampling from a GPT: guidance, the state of a token shift, prefixes, features."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.models.pixels import channels_first, to_range
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.onnxrt import OnnxrtSession

LABELS = [0, 2, 1, 2]
PLACES = 2**17  # 32 MB a cache
WHOLE = {"temperature": 1, "top_k": 0, "top_p": 1, "guidance_scale": 1}


@pytest.fixture(params=["vit", "vqgan", "llamagen"])
def either(request):
    """The pipeline of a system, and the system.

    ONNX Runtime's bodies and a plain GPT, portable ones and a shift, or heads that are filled up.
    """
    return request.getfixturevalue(f"{request.param}_pipeline"), request.getfixturevalue(f"{request.param}_system")


def in_pytorch(system, labels, seed=0, **options):
    options = WHOLE | options
    size, shape = system.config.prior.codebook_size, (len(labels), 1)

    def noise(position):
        out = np.empty((*shape, size), np.float32)
        gumbel([(seed, image, position) for image in range(len(labels))], out)
        return torch.from_numpy(out)

    sampling = torch.full(shape, float(options["temperature"])), torch.full(shape, options["top_k"] or size)
    top_p = torch.full(shape, float(options["top_p"]))
    return system.prior.generate(torch.tensor(labels), noise, *sampling, top_p, options["guidance_scale"]).numpy()


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 2.5}, {"guidance_scale": 0}, {"temperature": 0.7, "top_k": 9, "guidance_scale": 4}],
)
def test_generate_draws_the_codes_that_pytorch_draws(either, options):
    pipeline, system = either
    expected = in_pytorch(system, LABELS, seed=3, **options)
    result = pipeline.generate(LABELS, seed=3, **(WHOLE | options))
    np.testing.assert_array_equal(result.codes, expected)


def test_no_label_is_a_label_of_its_own(either):
    pipeline, system = either
    known = np.full((2, *pipeline.grid), -1)
    expected = in_pytorch(system, [system.config.prior.classes] * 2, seed=1)
    np.testing.assert_array_equal(pipeline.complete(known, None, seed=1, **WHOLE).codes, expected)


def test_an_image_is_the_same_alone_and_after_other_requests(either):
    pipeline, _ = either
    batch = pipeline.generate(LABELS, seed=5, guidance_scale=2).codes
    for i, label in enumerate(LABELS):
        alone = pipeline.generate([label], seed=5, first_image=i, guidance_scale=2).codes
        np.testing.assert_array_equal(alone[0], batch[i])


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_completion_goes_on_from_the_first_rows(either, rows, scale):
    pipeline, _ = either
    whole = pipeline.generate(LABELS, seed=2, guidance_scale=scale).codes
    known = whole.copy()
    known[:, rows:] = -1
    np.testing.assert_array_equal(pipeline.complete(known, LABELS, seed=2, guidance_scale=scale).codes, whole)


@pytest.fixture(params=[1, 2, 5])
def narrow(request, vit_package, tmp_path):
    """A pipeline whose calls take few rows, and how many."""
    build(vit_package, tmp_path / "narrow.plan", batch=SizeRange(1, 1, request.param))
    return load(tmp_path / "narrow.plan", threads=1), request.param


@pytest.mark.parametrize("scale", [1, 2])
def test_no_call_takes_more_rows_than_the_plan_allows(narrow, vit_pipeline, monkeypatch, scale):
    (pipeline, largest), sizes, bind = narrow, set(), OnnxrtSession.bind
    expected = vit_pipeline.generate(LABELS, seed=1, guidance_scale=scale).codes
    monkeypatch.setattr(OnnxrtSession, "bind", lambda *args: sizes.add(args[1]["batch"]) or bind(*args))
    if scale > largest:
        with pytest.raises(VqdeployError, match=r"2 or more, found 1\. Fix: vqdeploy build PACKAGE --max-batch 2"):
            pipeline.generate(LABELS, guidance_scale=scale)
        pipeline.complete(expected * 0 - 1, None, guidance_scale=scale)  # nothing to guide to
    else:
        np.testing.assert_array_equal(pipeline.generate(LABELS, seed=1, guidance_scale=scale).codes, expected)
    assert max(sizes) <= largest


def test_caches_are_updated_in_place(vit_pipeline):
    session = vit_pipeline.session("step")
    assert len(session.stage.aliases) == 2 * 3
    binding = session.bind({"batch": 2, "images": 2, "length": 1})
    binding.inputs["top_k"][:] = 64
    binding.inputs["temperature"][:] = 1
    binding.run()
    results = dict(zip([o.name for o in session.stage.outputs], binding._io.get_outputs(), strict=True))
    for output, name in session.stage.aliases.items():
        assert results[output].data_ptr() == binding.inputs[name].ctypes.data
        assert (binding.inputs[name][:, :, 0] != 0).any()
        assert (binding.inputs[name][:, :, 1:] == 0).all()


class LongCaches(Bundle):
    """A plan whose `step` has more places in its caches than there are positions."""

    def read(self, name):
        content = super().read(name)
        if name != "step.onnx":
            return content
        graph = onnx.load_from_string(content)
        for info in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
            if info.name.startswith(("past_", "present_")):
                info.type.tensor_type.shape.dim[2].dim_value = PLACES
        return graph.SerializeToString()

    def step(self):
        stage = self.manifest.stage("step")

        def longer(infos):
            caches = ("past_", "present_")
            shapes = [(*i.shape[:2], PLACES, i.shape[3]) if i.name.startswith(caches) else i.shape for i in infos]
            return tuple(dataclasses.replace(info, shape=shape) for info, shape in zip(infos, shapes, strict=True))

        return dataclasses.replace(stage, inputs=longer(stage.inputs), outputs=longer(stage.outputs))


def resident():
    """Bytes of this process that are in memory, those of mapped files too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_step_touches_no_more_of_the_caches_than_the_places_in_use(vit_plan, tmp_path):
    """The caches lie in files full of holes: what is read or written of them comes into memory, and nothing else."""
    bundle = LongCaches(vit_plan)
    nodes = onnx.load_from_string(bundle.read("step.onnx")).graph.node
    assert [node.op_type for node in nodes].count("GroupQueryAttention") == 3
    session = OnnxrtSession(bundle, bundle.step(), threads=1)
    infos = [info for info in session.stage.inputs if info.name.startswith("past_")]
    shape = (1, *infos[0].shape[1:])
    caches = {info.name: np.memmap(tmp_path / info.name, np.float32, "w+", shape=shape) for info in infos}
    total = sum(cache.nbytes for cache in caches.values())
    binding = session.bind({"batch": 1, "images": 1, "length": 1}, caches)
    binding.inputs["top_k"][:] = binding.inputs["temperature"][:] = 1
    before = resident()
    for position in range(16):
        binding.inputs["position"][:] = position
        binding.run()
    assert resident() - before < total / 10
    assert all(cache[0, :, :16].any((0, 2)).all() for cache in caches.values())

    for output in session.stage.aliases:  # with other buffers for the results, it would copy
        binding._io.bind_output(output, "cpu")
    binding.run()
    assert resident() - before > total


@pytest.mark.parametrize("labels", [None, [0, 2, 1]])
@pytest.mark.parametrize("either", ["vit", "vqgan"], indirect=True)
def test_features_are_those_of_pytorch_at_every_layer(either, labels):
    pipeline, system = either
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    features = pipeline.features(images, labels)
    with torch.no_grad():
        codes = torch.from_numpy(pipeline.encode(images))
        rows = torch.tensor(labels or [system.config.prior.classes] * 3)
        expected = [system.prior.features(codes, rows, layer) for layer in range(4)]
    assert features.shape == (3, 4, 64)
    for layer in range(4):
        np.testing.assert_allclose(features[:, layer], expected[layer], atol=1e-4 * expected[layer].abs().max())


def test_systems_without_features_say_so(pipeline):
    with pytest.raises(VqdeployError, match="no features"):
        pipeline.features(np.zeros((1, 16, 16, 3), np.uint8))


def test_tokenizer(vit_pipeline, vit_system):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    with torch.no_grad():
        expected = vit_system.tokenizer.encode(to_range(channels_first(torch.from_numpy(images)), (0.0, 1.0))).numpy()
    np.testing.assert_array_equal(vit_pipeline.encode(images), expected)
