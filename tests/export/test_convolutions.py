"""Decoders in int8: the operator against integer arithmetic of numpy, steps that fit any codes, and whole plans."""

import copy
import json
import shutil
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from support.mutations import failed, failures, reseal

from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.export.convolutions import QuantizedConvolution, calibration_codes, quantize_convolutions
from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.export.package import export
from vqdeploy.runtime.manifest import WEIGHTS
from vqdeploy.verify import verify

NAMES = ("weight", "scale", "bias", "step", "zero", "output_step", "output_zero")


def by_numpy(x, layer):
    """The convolution in integers of 64 bits, by a sum over the places of the kernel."""
    weight, scale, bias, step, zero, output_step, output_zero = (getattr(layer, name).numpy() for name in NAMES)
    integers = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64) - zero
    pad = layer.padding
    padded = np.pad(integers, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = (size - weight.shape[-1] + 1 for size in padded.shape[2:])
    sums = np.zeros((len(x), len(weight), height, width), np.int64) + bias[:, None, None]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            part = padded[:, :, i : i + height, j : j + width]
            sums += np.einsum("oc,bchw->bohw", weight[:, :, i, j].astype(np.int64), part)
    y = sums * (scale.astype(np.float64) * step)[:, None, None]
    return (np.clip(np.rint(y / output_step) + output_zero, 0, 255) - output_zero) * output_step


def example(channels, outputs, kernel, side, seed):
    torch.manual_seed(seed)
    layer = torch.nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    x = torch.randn(2, channels, side, side) + 0.5
    with torch.no_grad():
        y = layer(x)
    extents = [(float(t.min()), float(t.max())) for t in (x, y)]
    return x, y, QuantizedConvolution(layer, *extents)


def model_of(layer, shape):
    constants = [numpy_helper.from_array(getattr(layer, name).numpy(), name) for name in NAMES]
    node = helper.make_node("QuantizedConvolution", ["x", *NAMES], ["y"], domain=DOMAIN, padding=layer.padding)
    maps = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, shape[1], None, None])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, None, None])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "graph", [maps], [out], constants)
    functions = [function("QuantizedConvolution", padding=layer.padding)]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    return model.SerializeToString()


def session(layer, shape):
    return ort.InferenceSession(model_of(layer, shape), providers=["CPUExecutionProvider"])


@given(st.integers(1, 40), st.integers(1, 24), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(0, 1000))
def test_the_operator_in_pytorch_and_onnx_runtime(channels, outputs, kernel, side, seed):
    x, exact, layer = example(channels, outputs, kernel, side, seed)
    expected = by_numpy(x.numpy(), layer)
    step = float(layer.output_step)
    for found in (layer(x).numpy(), session(layer, x.shape).run(None, {"x": x.numpy()})[0]):
        # Halves may be rounded either way: of the inputs, then of the result.
        off = np.abs(found - expected) / step
        assert off.max() <= 2.01
        assert np.mean(off > 0.01) <= 0.02 + 2 / off.size
    assert np.abs(expected - exact.numpy()).max() < 0.1 * exact.abs().max() + 2 * step


def test_an_image_does_not_depend_on_its_batch():
    x, _, layer = example(16, 8, 3, 9, 0)
    run = session(layer, x.shape).run
    together = run(None, {"x": x.numpy()})[0]
    assert (together == np.concatenate([run(None, {"x": x[i : i + 1].numpy()})[0] for i in (0, 1)])).all()


def test_integers_do_not_saturate_on_any_machine():
    """AVX2 without VNNI adds two products in 16 bits."""
    layer = torch.nn.Conv2d(64, 4, 3, bias=False)
    torch.nn.init.constant_(layer.weight, 1.0)
    quantized = QuantizedConvolution(layer, (0.0, 1.0), (0.0, 64 * 9.0))
    x = np.ones((1, 64, 3, 3), np.float32)
    assert quantized.weight.abs().max() <= 63
    assert session(quantized, x.shape).run(None, {"x": x})[0] == pytest.approx(np.full((1, 4, 1, 1), 576.0), rel=1e-3)


def test_a_map_of_zeros_and_a_kernel_of_zeros():
    layer = torch.nn.Conv2d(3, 2, 3, padding=1)
    torch.nn.init.zeros_(layer.weight)
    low, high = layer.bias.detach().aminmax()
    quantized = QuantizedConvolution(layer, (0.0, 0.0), (float(low), float(high)))
    found = session(quantized, (1, 3, 4, 4)).run(None, {"x": np.zeros((1, 3, 4, 4), np.float32)})[0]
    expected = layer.bias.detach().numpy()[:, None, None]
    assert np.abs(found - expected).max() <= float(quantized.output_step) / 2 * 1.001


@pytest.mark.parametrize("largest", [1e-2, 1e-5, 1e-7, 1e-20])
def test_biases_fit_integers_however_small_the_weights_are(largest):
    layer = torch.nn.Conv2d(3, 2, 3, padding=1)
    torch.nn.init.uniform_(layer.weight, -largest, largest)
    torch.nn.init.constant_(layer.bias, 0.5)
    x = torch.randn(1, 3, 4, 4)
    expected = layer(x).detach().numpy()
    quantized = QuantizedConvolution(layer, (float(x.min()), float(x.max())), (-1.0, 1.0))
    found = session(quantized, x.shape).run(None, {"x": x.numpy()})[0]
    assert np.abs(found - expected).max() <= float(quantized.output_step)


def test_the_first_and_the_last_convolution_stay():
    module = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(4)))
    quantize_convolutions(module, torch.randn(2, 4, 3, 3))
    assert [isinstance(part, QuantizedConvolution) for part in module] == [False, True, True, False]


def test_codes_to_observe_a_decoder_on_are_the_same_each_time(system):
    size = (system.tokenizer.config.resolution,) * 2
    codes = calibration_codes(system.tokenizer, size)
    assert torch.equal(codes, calibration_codes(system.tokenizer, size))
    assert codes.shape[1:] == system.tokenizer.config.grid
    assert 0 <= codes.min() <= codes.max() < system.tokenizer.config.codebook_size


# Plans


@pytest.fixture(scope="session")
def decoder(artifacts):
    return artifacts.package("rqvae", "decode=int8")


def test_what_a_package_holds(decoder, artifacts):
    precisions = {s["name"]: s["precision"] for s in json.loads((decoder / "manifest.json").read_text())["stages"]}
    assert precisions == {"encode": "fp32", "decode": "int8", "step": "fp32"}
    assert (decoder / WEIGHTS).stat().st_size < (artifacts.package("rqvae") / WEIGHTS).stat().st_size
    kinds = [node.op_type for node in onnx.load(decoder / "decode.onnx", load_external_data=False).graph.node]
    assert sum(kind.startswith("QuantizedConvolution") for kind in kinds) >= 5
    assert kinds.count("Conv") == 2


@pytest.mark.parametrize("portable", [False, True])
def test_a_plan_decodes_as_well_as_verify_demands(artifacts, system, portable):
    report = verify(artifacts.plan("rqvae", "decode=int8", portable=portable), system)
    assert report["passed"]
    allowed = {(check["stage"], check["metric"]): check["limit"] for check in report["checks"]}
    assert allowed["decode", "largest difference in grey levels"] == 64
    # The encoder is in fp32, and judged as such.
    assert allowed["encode", "share of codes that differ"] == 0.01


def test_verify_finds_kernels_that_lie_on_their_side(decoder, system, tmp_path):
    package = shutil.copytree(decoder, tmp_path / "package")
    weights = load_file(package / WEIGHTS)
    graph = onnx.load(package / "decode.onnx", load_external_data=False).graph
    for node in graph.node:
        if node.op_type.startswith("QuantizedConvolution"):
            weights[node.input[1]] = np.ascontiguousarray(weights[node.input[1]].swapaxes(2, 3))
    save_file(weights, package / WEIGHTS)
    reseal(package)
    build(package, tmp_path / "a.plan")
    failed(failures(verify(tmp_path / "a.plan", system)), "decode: PSNR of the worst image")


def test_onnx_runtime_merges_each_into_one_product_of_integers(tmp_path):
    """Without the merge it would be slower than fp32."""
    x, _, layer = example(16, 8, 3, 9, 0)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model_of(layer, x.shape), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "QLinearConv" in kinds
    assert "Conv" not in kinds


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_is_told_what_to_do_instead(decoder, tmp_path):
    message = r"TensorRT cannot build decode in int8: .* Fix: vqdeploy export without decode=int8"
    with pytest.raises(VqdeployError, match=message):
        build(decoder, tmp_path / "a.plan", backend="tensorrt-rtx")


@pytest.mark.parametrize("factor", [1e38, torch.nan])
def test_a_decoder_that_overflows_is_refused(system, tmp_path, factor):
    broken = copy.deepcopy(system)
    with torch.no_grad():
        broken.tokenizer.decoder.conv_in.weight[0] *= factor
    with pytest.raises(VqdeployError, match="the activations of a decoder are not finite, and have no scale in int8"):
        export(broken, tmp_path / "onnx", "decode=int8")
    assert not list(tmp_path.iterdir())
