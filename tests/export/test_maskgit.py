"""The package of a masked system: its graphs, and what they compute against PyTorch."""

import numpy as np
import onnx
import pytest
import torch

from vqdeploy.engines.package import read
from vqdeploy.models.pixels import channels_first, channels_last, to_range, to_uint8
from vqdeploy.runtime import load

SYSTEMS = ["movq", "adaptive"]


@pytest.fixture(params=SYSTEMS)
def kind(request):
    return request.param


@pytest.fixture
def folder(request, kind):
    return request.getfixturevalue(f"{kind}_package")


@pytest.fixture
def model(request, kind):
    return request.getfixturevalue(f"{kind}_system")


@pytest.fixture(params=["movq_plan", "movq_portable_plan", None])
def pair(request):
    """A pipeline and its system in PyTorch."""
    if request.param is None:
        return request.getfixturevalue("adaptive_pipeline"), request.getfixturevalue("adaptive_system")
    return load(request.getfixturevalue(request.param), threads=1), request.getfixturevalue("movq_system")


def custom_nodes(folder, stage):
    graph = onnx.load(folder / f"{stage}.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.domain not in ("", "ai.onnx")]


@pytest.mark.parametrize("stage", ["encode", "decode", "step"])
def test_the_checker_accepts_every_graph(folder, stage):
    onnx.checker.check_model(folder / f"{stage}.onnx", full_check=True)


def test_operators_stay_single_nodes(folder, kind, model):
    found = {stage: custom_nodes(folder, stage) for stage in ("encode", "decode", "step")}
    names = {stage: [node.op_type for node in nodes] for stage, nodes in found.items()}
    blocks = {"movq": ["PackedAttention"] * model.config.prior.layers, "adaptive": []}[kind]
    assert names == {"encode": ["VQNearest"], "decode": ["VQLookup"], "step": [*blocks, "GumbelSample"]}
    metric = {a.name: onnx.helper.get_attribute_value(a) for a in found["encode"][0].attribute}["metric"]
    assert metric == {"movq": b"l2", "adaptive": b"cosine"}[kind]


def test_inputs_and_outputs(folder, kind):
    step, grid = read(folder).stage("step"), (4, 4, {"movq": 4, "adaptive": 1}[kind])
    codes, conditions, per_channel = ("batch", *grid), ("batch", "conditions"), ("batch", grid[-1])
    assert [(info.name, info.dtype, info.shape) for info in step.inputs] == [
        ("codes", "int64", codes),
        ("given", "int64", codes),
        ("label", "int64", conditions),
        ("guidance", "float32", conditions),
        ("noise", "float32", (*codes, 32)),
        ("choice_noise", "float32", codes),
        ("masked", "int64", ("batch",)),
        ("temperature", "float32", per_channel),
        ("top_k", "int64", per_channel),
        ("top_p", "float32", per_channel),
        ("choice_temperature", "float32", ("batch",)),
    ]
    outputs = [("drawn", "int64", codes), ("remaining", "int64", codes), ("logits", "float32", (*codes, 32))]
    assert [(info.name, info.dtype, info.shape) for info in step.outputs] == outputs
    assert step.aliases == {}
    encode, decode = read(folder).stage("encode"), read(folder).stage("decode")
    assert [info.shape for info in (*encode.inputs, *decode.outputs)] == [("batch", 16, 16, 3)] * 2
    assert [info.shape for info in (*encode.outputs, *decode.inputs)] == [codes] * 2


@pytest.mark.parametrize("stage", ["encode", "decode", "step"])
def test_no_operator_that_tensorrt_lacks_or_that_has_no_seed(folder, stage):
    graph = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    used = {n.op_type for n in graph.graph.node} | {n.op_type for f in graph.functions for n in f.node}
    assert not used & {"RandomUniform", "RandomNormal", "Multinomial", "Bernoulli", "NonZero", "Loop", "Scan"}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("conditions", [1, 2, 3])
@torch.no_grad()
def test_logits_are_those_of_the_prior(pair, batch, conditions):
    """For any number of labels, each image with its own, weighed by the guidance."""
    pipeline, system = pair
    rng, grid = np.random.default_rng(0), pipeline.grid
    codes = rng.integers(0, 33, (batch, *grid))  # 32 is the mask
    labels = rng.integers(0, 4, (batch, conditions))  # 3 is no label
    guidance = rng.normal(size=(batch, conditions)).astype(np.float32)
    logits = pipeline.session("step").run(
        codes=codes,
        given=codes,
        label=labels,
        guidance=guidance,
        noise=np.zeros((batch, *grid, 32), np.float32),
        choice_noise=np.zeros((batch, *grid), np.float32),
        masked=np.zeros(batch, np.int64),
        temperature=np.ones((batch, grid[-1]), np.float32),
        top_k=np.full((batch, grid[-1]), 32),
        top_p=np.ones((batch, grid[-1]), np.float32),
        choice_temperature=np.zeros(batch, np.float32),
    )["logits"]
    each = [system.prior.logits(torch.from_numpy(codes), torch.from_numpy(column)).numpy() for column in labels.T]
    expected = sum(w[:, None, None, None, None] * one for w, one in zip(guidance.T, each, strict=True))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(each).max())


@torch.no_grad()
def test_encode_and_decode_against_pytorch(pair):
    pipeline, system = pair
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    expected = system.tokenizer.encode(to_range(channels_first(torch.from_numpy(images)), (-1.0, 1.0)))
    np.testing.assert_array_equal(pipeline.encode(images), expected)
    codes = rng.integers(0, 32, (5, *pipeline.grid))
    expected = channels_last(to_uint8(system.tokenizer.decode(torch.from_numpy(codes)), (-1.0, 1.0))).numpy()
    assert expected.std() > 20
    assert np.abs(pipeline.decode(codes).astype(int) - expected).max() <= 1
