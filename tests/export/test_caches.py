"""KV caches in int8: their scales, what is refused, and whole plans. The operator is in `test_functions.py`."""

import shutil
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.mutations import failed, failures, reseal

from vqdeploy.engines.build import build
from vqdeploy.engines.package import read
from vqdeploy.errors import VqdeployError
from vqdeploy.export.layers import CachedAttention
from vqdeploy.export.package import export, stages_of
from vqdeploy.export.precision import QuantizedCachedAttention
from vqdeploy.export.rounding import observed
from vqdeploy.runtime.bundle import WEIGHTS
from vqdeploy.systems import create
from vqdeploy.verify import verify

DTYPE = "int8,caches=int8"
SYSTEMS = ("rqvae", "text", "vit", "vqgan", "llamagen", "features")


def step_of(system, dtype):
    (step,) = (stage for stage in stages_of(system, dtype) if stage.name == "step")
    return step


@pytest.mark.parametrize("name", SYSTEMS)
def test_caches_hold_keys_and_values_of_random_codes(artifacts, name):
    """In one call that takes all entries: the caches of the stage with int8 against those of the same in fp32."""
    system = artifacts.system(name)
    exact, int8 = step_of(system, "int8"), step_of(system, DTYPE)
    places = exact.inputs["past_key"][0].shape[2]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(
        system.prior.config.codebook_size, (2, places, exact.inputs["codes"].shape[2]), generator=generator
    )
    condition = {n: x for n, x in exact.inputs.items() if n in ("text", "text_length")}
    if "text" in condition and condition["text"].is_floating_point():
        condition["text"] = torch.randn(condition["text"].shape, generator=generator)
        condition["text_length"] = torch.full((2,), condition["text"].shape[1])
    with torch.no_grad():
        wanted, found = (each.module(*(each.inputs | condition | {"codes": codes}).values()) for each in (exact, int8))
    parts = [part for part in int8.module.body.modules() if isinstance(part, QuantizedCachedAttention)]
    scales = [part.key_scale for part in parts] + [part.value_scale for part in parts]
    caches = [n for n in int8.outputs if n.startswith(("present_key", "present_value"))]
    assert len(caches) == len(scales) > 1
    first = (int8.outputs.index(caches[0]), exact.outputs.index(caches[0]))
    for i, scale in enumerate(scales):
        cache, floats = found[first[0] + i], wanted[first[1] + i]
        assert cache.dtype == torch.int8
        assert (scale > 0).all()
        outside = floats.abs() > 127.5 * scale
        assert outside.float().mean() < 1e-3  # random codes other than those that were observed
        if i in (0, len(parts)):  # the entries of the first layer are the same
            off = (cache * scale - floats).abs() / scale
            assert off[~outside.expand_as(off)].max() <= 0.501
        assert cache.abs().amax((0, 2, 3)).float().min() > 40  # each head uses its range


def test_what_is_observed_is_forgotten(artifacts):
    system = artifacts.system("vit")
    with observed(system):
        layer = system.prior.transformer.blocks[0].attn.key
        assert layer.largest.shape == (64,)
    assert not any("largest" in vars(part) for part in system.prior.modules())


def test_heads_that_are_zero_and_heads_that_overflow():
    attention = CachedAttention(torch.tensor([[0.0, 1.27], [2.54, 0.0]]))
    quantized = QuantizedCachedAttention(attention, 8)
    assert quantized.key_scale.shape == quantized.value_scale.shape == (1, 2, 1, 8)
    torch.testing.assert_close(quantized.key_scale[0, :, 0, 0], torch.tensor([1.0, 0.01]))
    torch.testing.assert_close(quantized.value_scale[0, :, 0, 0], torch.tensor([0.02, 1.0]))
    with pytest.raises(VqdeployError, match="too large to store in int8"):
        QuantizedCachedAttention(CachedAttention(torch.tensor([[1.0], [torch.inf]])), 8)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (
            "vit",
            "caches=int8",
            "only an autoregressive prior with products in int8 .* Fix: --dtype int8,caches",
        ),
        ("vit", "fp16,caches=int8", "only an autoregressive prior with products in int8 or int4"),
        ("vit", "int8,step=fp32,caches=int8", "only an autoregressive prior with products in int8 or int4"),
        ("vit", "int8,caches=fp16", "KV caches have the type of their stage, or int8"),
        ("vit", "int8,caches=int4", "KV caches have the type of their stage, or int8"),
        ("movq", DTYPE, "only an autoregressive prior .* Fix: leave out caches=int8"),
        ("vqvae2", DTYPE, "only an autoregressive prior"),
        ("var", DTYPE, "only an autoregressive prior"),
    ],
)
def test_what_is_refused(artifacts, name, dtype, message, tmp_path):
    with pytest.raises(VqdeployError, match=message):
        export(artifacts.system(name), tmp_path / "onnx", dtype)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_alone_has_none(artifacts, tmp_path):
    config = artifacts.system("vit").config
    with pytest.raises(VqdeployError, match="only an autoregressive prior"):
        export(create(type(config)(**vars(config) | {"prior": None})), tmp_path / "onnx", DTYPE)


# Packages and plans


@pytest.mark.slow
def test_what_a_package_and_a_plan_hold(artifacts):
    package, plain = artifacts.package("vit", DTYPE), artifacts.package("vit")
    manifest = read(package)
    assert (manifest.precision, [stage.precision for stage in manifest.stages]) == (
        "int8",
        ["fp32", "fp32", "int8", "int8"],
    )
    types = {info.name.split(".")[0]: info.dtype for info in manifest.stage("step").inputs}
    assert (types["past_key"], types["past_value"], types["noise"]) == ("int8", "int8", "float32")
    nodes = [node.op_type for node in onnx.load(package / "step.onnx", load_external_data=False).graph.node]
    assert nodes.count("QuantizedCachedAttention") == 3
    assert "CachedAttention" not in nodes
    bundle = artifacts.pipeline("vit", DTYPE).bundle
    graph = onnx.load_from_string(bytes(bundle.member("step.onnx"))).graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [len(node.input) for node in attentions] == [14] * 3
    assert len([name for name in manifest.stage("step").weights if name.endswith("_scale")]) == 6
    assert not any("attend" in name for name in read(plain).stage("step").weights)


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
def test_a_good_plan_passes(artifacts, portable):
    assert failures(verify(artifacts.plan("vit", DTYPE, portable=portable), artifacts.system("vit"))) == set()


def test_scales_that_cut_off_keys_are_found(artifacts, tmp_path):
    package = shutil.copytree(artifacts.package("vit", DTYPE), tmp_path / "package")
    weights = load_file(package / WEIGHTS)
    for name in weights:
        if name.endswith("key_scale"):
            weights[name] = weights[name] / 4
    save_file(weights, package / WEIGHTS)
    reseal(package)
    build(package, tmp_path / "a.plan")
    report = verify(tmp_path / "a.plan", artifacts.system("vit"))
    failed(failures(report), "step: drawn codes: Kullback-Leibler divergence")


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
def test_an_image_alone_is_the_image_in_a_batch(artifacts, portable):
    pipeline = artifacts.pipeline("vit", DTYPE, portable=portable)
    together = pipeline.generate([0, 1, 2], seed=3).codes
    np.testing.assert_array_equal(pipeline.generate([1], seed=3, first_image=1).codes[0], together[1])


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
def test_a_slot_that_is_taken_again_starts_anew(artifacts, portable):
    """Completions of a known half, after images that filled the caches."""
    pipeline = artifacts.pipeline("vit", DTYPE, portable=portable)
    known = np.full((1, *pipeline.grid), -1)
    known[:, : pipeline.grid[0] // 2] = 5
    first = pipeline.complete(known, [2], seed=1).codes
    pipeline.generate([0, 1], seed=2)
    np.testing.assert_array_equal(pipeline.complete(known, [2], seed=1).codes, first)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_says_why_it_has_none(artifacts, tmp_path):
    with pytest.raises(VqdeployError, match="TensorRT cannot build step with KV caches in int8: its TensorScatter"):
        build(artifacts.package("vit", DTYPE), tmp_path / "a.plan", backend="tensorrt-rtx")
