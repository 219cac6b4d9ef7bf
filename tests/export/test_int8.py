"""Products in int8: the operator against integer arithmetic of numpy, the choice of precisions, and whole plans."""

import copy
import json
import re
import shutil
from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file
from support.mutations import change_function, change_weight, failed, failures, replace_with, reseal

from vqdeploy.engines.bodies_onnxrt import block_product, swap_in
from vqdeploy.engines.build import build
from vqdeploy.engines.package import read
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.export.layers import Product
from vqdeploy.export.package import export, stages_of
from vqdeploy.export.precision import QuantizedProduct, _quantizable
from vqdeploy.export.rounding import observed, rounded_columns
from vqdeploy.models.transformer import Block
from vqdeploy.precision import MIXED, Choice
from vqdeploy.runtime import load
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.systems import definition
from vqdeploy.verify import verify, verify_package


def graph_of(weight, scale, own, taps=0):
    """A graph of one node, a convolution along rows if it has taps, with the portable body or ONNX Runtime's."""
    name, attributes = ("QuantizedRowConvolution", {"taps": taps}) if taps else ("QuantizedLinear", {})
    axes = ["batch", "w"] if taps else ["rows"]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(scale, "scale")]
    node = helper.make_node(name, ["x", "weight", "scale"], ["y"], domain=DOMAIN, **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [*axes, len(weight) // max(taps, 1)])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*axes, len(scale)])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "graph", [x], [y], constants)
    functions = [function(name, **attributes)]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    if own:
        swap_in(model, 0)
    return model


def session(weight, scale, own, taps=0):
    """That graph in ONNX Runtime, which replaces the portable body by a product of its own, in 8 bits too."""
    graph = graph_of(weight, scale, own, taps)
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def integers(x, weight, scale):
    """What ONNX Runtime's body computes, in integers of 64 bits."""
    largest = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30))
    rows = np.rint(x / largest * np.float32(127)).astype(np.int64)
    return (rows @ weight.astype(np.int64)) * largest * scale / 127


@given(st.integers(0, 99), st.sampled_from([1.0, 8.0, 30.0]))
def test_the_scale_of_a_column_has_the_smallest_error(seed, outlier):
    """Against every scale that is tried, in 64 bits; a column with an outlier is cut off."""
    weight = np.random.default_rng(seed).normal(0, 0.1, (40, 5))
    weight[0] *= outlier
    rounded, scale = (x.numpy() for x in rounded_columns(torch.tensor(weight, dtype=torch.float32)))

    def error(scales):
        return ((np.clip(np.rint(weight / scales), -63, 63) * scales - weight) ** 2).sum(0)

    wanted = np.min([error(np.abs(weight).max(0) / 63 * share) for share in np.linspace(1, 0.6, 21)], 0)
    assert rounded.dtype == np.int8
    assert np.abs(rounded).max() <= 63
    np.testing.assert_allclose(((rounded * scale.astype(float) - weight) ** 2).sum(0), wanted, rtol=1e-3)


def test_a_column_has_at_least_the_smallest_scale():
    weight = torch.tensor([[0.0, 0.63, 6.3], [0.0, -0.1, 0.2]])
    rounded, scale = rounded_columns(weight, 0.05)
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.05, 0.1]))
    assert rounded.tolist() == [[0, 13, 63], [0, -2, 2]]


def test_what_is_known_of_inputs_makes_the_outputs_closer():
    """Of inputs that no block of 32 divides, too."""
    torch.manual_seed(0)
    mixed = torch.randn(40, 120)
    weight, x, fresh = torch.randn(120, 48), torch.randn(1000, 40) @ mixed, torch.randn(1000, 40) @ mixed

    def error(rounded, scale):
        return (fresh @ (rounded * scale - weight)).square().mean()

    known, unknown = rounded_columns(weight, moment=x.T @ x), rounded_columns(weight)
    assert error(*known) < 0.2 * error(*unknown)
    torch.testing.assert_close(known[1], unknown[1])
    assert known[0].abs().max() <= 63


@pytest.mark.parametrize("name", ["rqvae", "text", "vit", "llamagen", "features", "movq", "adaptive", "var", "shared"])
def test_what_is_rounded_knows_its_inputs(artifacts, name):
    system = artifacts.system(name)
    with observed(system):
        stages = definition(system.config.model).stages(system.prior, "fp32")
    parts = [part for stage in stages for *_, part in _quantizable(stage.module)]
    assert len(parts) > 4
    for part in parts:
        inputs = part.in_features if isinstance(part, torch.nn.Linear) else len(part.weight)
        assert part.moment.shape == (inputs, inputs)
        assert part.moment.any()
        assert not part._forward_hooks


def example(rows, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs), dtype=np.float32) * rng.lognormal(0, 2, (rows, 1)).astype(np.float32)
    weight = rng.integers(-63, 64, (inputs, outputs)).astype(np.int8)
    return x, weight, rng.lognormal(-3, 1, outputs).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
def test_both_bodies(rows, inputs, outputs, seed):
    x, weight, scale = example(rows, inputs, outputs, seed)
    exact = x.astype(np.float64) @ (weight * scale.astype(np.float64))
    size = np.abs(x).astype(np.float64) @ (np.abs(weight) * scale.astype(np.float64))
    (portable,) = ReferenceEvaluator(graph_of(weight, scale, own=False)).run(None, {"x": x})
    assert (np.abs(portable - exact) <= 1e-5 * size).all()
    found = torch.ops.vqdeploy.quantized_product(*map(torch.from_numpy, (x, weight, scale)))
    assert (np.abs(found.numpy() - exact) <= 1e-5 * size).all()
    (own,) = session(weight, scale, own=True).run(None, {"x": x})
    # A unit that lies halfway between two integers may be rounded either way.
    step = np.abs(x).max(1, keepdims=True) / 127 * np.abs(weight).max(0) * scale
    assert (np.abs(own - integers(x, weight, scale)) <= 1e-5 * size + 1.01 * step).all()
    assert np.median(np.abs(own - integers(x, weight, scale)) / np.maximum(size, 1e-30)) < 1e-5


def by_blocks(weight, scale, size=64):
    """The product of a plan for few rows, in ONNX Runtime."""
    inputs, outputs = weight.shape
    table = (weight.T.astype(np.int16) + 128).astype(np.uint8).reshape(outputs, -1, size)
    model, sizes = graph_of(weight, scale, own=False), (inputs, outputs, 8, size)
    scales = np.ascontiguousarray(np.broadcast_to(scale[:, None], table.shape[:2]))
    del model.graph.initializer[:], model.functions[:]
    model.graph.initializer.extend([numpy_helper.from_array(table, "table"), numpy_helper.from_array(scales, "scales")])
    model.graph.node[0].CopyFrom(block_product(model.graph.node[0], ["x", "table", "scales"], *sizes))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def by_integers(weight, scale):
    """The product of a plan for many rows."""
    return session(weight, scale, own=True)


both = pytest.mark.parametrize("product", [by_blocks, by_integers])


@both
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_numbers_do_not_overflow(product, sign):
    """Products of 255 and 127 in pairs overflow the int16 that AVX2 adds them in."""
    x, weight = np.ones((3, 4096), np.float32), np.full((4096, 32), 63 * sign, np.int8)
    (own,) = product(weight, np.ones(32, np.float32)).run(None, {"x": x})
    np.testing.assert_allclose(own, 4096 * 63 * sign, rtol=1e-6)
    assert QuantizedProduct(Product(torch.eye(8) * 1e3 + torch.randn(8, 8))).weight.abs().max() == 63


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([16, 32, 64]), st.integers(0, 1000))
def test_blocks_are_rounded_one_by_one(rows, blocks, size, seed):
    x, weight, scale = example(rows, blocks * size, 24, seed)
    (found,) = by_blocks(weight, scale, size).run(None, {"x": x})
    cut, matrix = x.reshape(rows, blocks, size), weight.reshape(blocks, size, 24).astype(np.float64)
    step = np.abs(cut).max(2, keepdims=True) / 127.0
    exact = np.einsum("rbi,bio->ro", np.rint(cut / step) * step, matrix) * scale
    # A unit that lies halfway between two integers may be rounded either way.
    allowed = np.einsum("rb,bo->ro", step[:, :, 0], np.abs(matrix).max(1)) * scale
    assert (np.abs(found - exact) <= 1.01 * allowed).all()
    size_of = np.abs(x).astype(np.float64) @ (np.abs(weight) * scale.astype(np.float64))
    assert np.median(np.abs(found - exact) / np.maximum(size_of, 1e-30)) < 1e-5


@pytest.mark.parametrize("product", [*(partial(by_blocks, size=size) for size in (16, 32, 64)), by_integers])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (192, 8), (512, 100), (2048, 24)])
def test_a_row_does_not_depend_on_the_others(product, inputs, outputs):
    x, weight, scale = example(17, inputs, outputs)
    own = product(weight, scale)
    (together,) = own.run(None, {"x": x})
    for rows in (1, 2, 3, 8):
        for start in range(0, len(x) - rows + 1, rows):
            part = slice(start, start + rows)
            np.testing.assert_array_equal(own.run(None, {"x": x[part]})[0], together[part])


@pytest.mark.parametrize("product", [by_blocks, by_integers, lambda *parts: session(*parts, own=False)])
def test_a_row_of_zeros(product):
    x, weight, scale = example(4, 64, 48)
    x[1] = 0
    (found,) = product(weight, scale).run(None, {"x": x})
    assert (found[1] == 0).all()
    assert np.isfinite(found).all()


@both
def test_what_overflows_is_not_hidden(product):
    x, weight, scale = example(4, 64, 48)
    x[2, 5] = np.inf
    x[3] = np.nan
    (found,) = product(weight, scale).run(None, {"x": x})
    assert not np.isfinite(found[2:]).any()
    assert np.isfinite(found[:2]).all()


def test_a_column_is_as_close_as_its_largest_weight_allows():
    torch.manual_seed(0)
    weight = torch.randn(256, 40) * torch.logspace(-4, 4, 40)
    weight[:, 7] = 0
    quantized = QuantizedProduct(Product(weight))
    error = (quantized.weight * quantized.scale - weight).square().mean(0).sqrt()
    assert (error <= weight.abs().amax(0) / 63 / 12**0.5 * 1.05).all()
    assert quantized.scale.isfinite().all()
    assert (quantized.scale > 0).all()


# Convolutions along rows


def convolved(x, kernel, dtype):
    """Adds up what each tap sees, tap by tap; `kernel` is [taps, inputs, outputs]."""
    side, width = len(kernel) // 2, x.shape[1]
    padded = np.pad(x.astype(dtype), ((0, 0), (side, side), (0, 0)))
    return sum(padded[:, tap : tap + width] @ kernel[tap].astype(dtype) for tap in range(len(kernel)))


def row_example(batch, width, inputs, taps, outputs=24, seed=0):
    x, weight, scale = example(batch * width, taps * inputs, outputs, seed)
    scales = np.random.default_rng(seed).lognormal(0, 2, (batch, 1, 1)).astype(np.float32)
    return x[:, :inputs].reshape(batch, width, inputs) * scales, weight, scale


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 3, 5, 7]), st.integers(0, 1000))
def test_both_bodies_of_a_row(batch, width, inputs, taps, seed):
    x, weight, scale = row_example(batch, width, inputs, taps, seed=seed)
    kernel = weight.reshape(taps, inputs, -1)
    exact, size = convolved(x, kernel * scale, np.float64), convolved(np.abs(x), np.abs(kernel) * scale, np.float64)
    (portable,) = session(weight, scale, False, taps).run(None, {"x": x})
    assert (np.abs(portable - exact) <= 1e-5 * size).all()
    found = torch.ops.vqdeploy.quantized_row_convolution(*map(torch.from_numpy, (x, weight, scale)), taps)
    assert (np.abs(found.numpy() - exact) <= 1e-5 * size).all()
    (own,) = session(weight, scale, True, taps).run(None, {"x": x})
    largest = np.abs(x).max((1, 2), keepdims=True)
    rounded = np.rint(x / largest * np.float32(127))
    expected = convolved(rounded, kernel, np.int64) * largest.astype(np.float64) * scale / 127
    # A unit that lies halfway between two integers may be rounded either way.
    step = largest / 127 * np.abs(weight).max(0) * scale
    assert (np.abs(own - expected) <= 1e-5 * size + 1.01 * step).all()
    assert np.median(np.abs(own - expected) / np.maximum(size, 1e-30)) < 1e-5


@pytest.mark.parametrize(("width", "inputs", "taps", "outputs"), [(8, 64, 3, 48), (7, 100, 5, 8), (32, 256, 5, 24)])
def test_a_row_of_an_image_does_not_depend_on_other_images(width, inputs, taps, outputs):
    x, weight, scale = row_example(9, width, inputs, taps, outputs)
    x[3], x[4, 2, 5], x[5] = 0, np.inf, np.nan
    own = session(weight, scale, True, taps)
    (together,) = own.run(None, {"x": x})
    assert (together[3] == 0).all()
    assert not np.isfinite(together[4:6]).any()
    assert np.isfinite(np.delete(together, [4, 5], 0)).all()
    for images in (1, 2, 4):
        for start in range(0, len(x) - images + 1, images):
            part = slice(start, start + images)
            np.testing.assert_array_equal(own.run(None, {"x": x[part]})[0], together[part])


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_numbers_of_rows_do_not_overflow(sign):
    weight = np.full((5 * 1024, 32), 63 * sign, np.int8)
    (own,) = session(weight, np.ones(32, np.float32), True, 5).run(None, {"x": np.ones((2, 8, 1024), np.float32)})
    taps = np.array([3, 4, 5, 5, 5, 5, 4, 3])
    np.testing.assert_allclose(own[0], np.repeat(1024 * 63 * sign * taps[:, None], 32, 1), rtol=1e-6)


@pytest.mark.parametrize("taps", [0, -1, 2, 2**40, None])
def test_a_row_that_was_tampered_with(artifacts, tmp_path, taps):
    package = shutil.copytree(artifacts.package("vqvae2", "int8"), tmp_path / "package")
    model = onnx.load(package / "bottom_row.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "QuantizedRowConvolution")
    attribute = next(attribute for attribute in node.attribute if attribute.name == "taps")
    if taps is None:
        node.attribute.remove(attribute)
    else:
        attribute.i = taps
    onnx.save(model, package / "bottom_row.onnx")
    reseal(package)
    with pytest.raises(ArtifactError, match="QuantizedRowConvolution has no attribute taps"):
        build(package, tmp_path / "plan")


@pytest.mark.parametrize(
    "name", ["QuantizedRowConvolution x", "QuantizedRowConvolution\n", "QuantizedRowConvolution (x) {"]
)
def test_a_row_with_an_odd_name(artifacts, tmp_path, name):
    package = shutil.copytree(artifacts.package("vqvae2", "int8"), tmp_path / "package")
    model = onnx.load(package / "bottom_row.onnx", load_external_data=False)
    for node in model.graph.node:
        node.op_type = name if node.op_type == "QuantizedRowConvolution" else node.op_type
    for body in model.functions:
        body.name = name if body.name == "QuantizedRowConvolution" else body.name
    onnx.save(model, package / "bottom_row.onnx")
    reseal(package)
    build(package, tmp_path / "plan")
    kinds = {
        node.op_type for node in onnx.load_from_string(Bundle(tmp_path / "plan").read("bottom_row.onnx")).graph.node
    }
    assert name in kinds


# The choice


@pytest.mark.parametrize(
    ("text", "encode", "step"),
    [
        ("fp32", "fp32", "fp32"),
        ("fp16", "fp16", "fp16"),
        ("int8", "fp32", "int8"),
        ("encode=fp16,step=int8", "fp16", "int8"),
        ("fp16, step=fp32", "fp16", "fp32"),
        ("step=int8", "fp32", "int8"),
    ],
)
def test_a_choice(text, encode, step):
    choice = Choice.parse(text)
    assert (choice.of_tokenizer("encode"), choice.of_prior("step", True)) == (encode, step)
    assert Choice.parse("int8").of_prior("condition", False) == "fp32"


@pytest.mark.parametrize("text", ["", ",", "int3", "step=", "=", "step=int8,", "step=int9", "Int8"])
def test_no_choice(text):
    with pytest.raises(VqdeployError, match="unsupported precision; expected fp32 or fp16 or int8 or int4, found '"):
        Choice.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8,int4", "the rest is given two precisions; found int8,int4"),
        ("step=int8,decode=fp16,step=fp32", "step is given two precisions"),
        (
            "step=bf16",
            "found 'bf16', which ONNX Runtime has no kernels for on the CPU",
        ),
        ("=int8", "a precision has no stage before its =; expected STAGE=PRECISION, found =int8"),
    ],
)
def test_a_choice_that_cannot_be(text, message):
    with pytest.raises(VqdeployError, match=re.escape(message)):
        Choice.parse(text)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("dcode=fp16", "there is no stage 'dcode' to export; expected encode or decode or step"),
        (
            "encode=int8",
            "an encoder whose weights are integers finds other codes. Fix: leave out encode=int8",
        ),
    ],
)
def test_what_does_not_suit_the_stages(system, tmp_path, dtype, message):
    with pytest.raises(VqdeployError, match=re.escape(message)):
        export(system, tmp_path / "onnx", dtype)
    assert not list(tmp_path.iterdir())


def test_rows_without_labels_are_quantized(artifacts):
    """Without a condition their convolutions are all that there is to quantize."""
    stages = stages_of(artifacts.system("three"), "int8")
    assert {stage.precision for stage in stages if stage.name.endswith(("_row", "_pixel"))} == {"int8"}


def test_the_system_stays_as_it_was(artifacts):
    """In int8 with caches in int8, too; what is not quantized is held once."""
    system = copy.deepcopy(artifacts.system("vit"))
    before = copy.deepcopy(system.prior.state_dict())
    exact, int8 = (
        next(stage.module for stage in stages_of(system, dtype) if stage.name == "step")
        for dtype in ("fp32", "int8,caches=int8")
    )
    for name, weight in system.prior.state_dict().items():
        assert torch.equal(weight, before[name]), name
    norms = [name for name, _ in int8.named_parameters() if "norm" in name]
    assert len(norms) == 14
    for name in norms:
        assert int8.get_parameter(name).data_ptr() == exact.get_parameter(name).data_ptr()


def test_progress(artifacts):
    told = []
    stages_of(artifacts.system("vit"), "int8,features=fp32", progress=told.append)
    first, *others = told
    assert first == "weights, rounded by codes that the prior draws: step 0"
    assert others == ["weights, rounded by the inputs of layers", "step, weights rounded"]
    told.clear()
    stages_of(artifacts.system("vit"), progress=told.append)
    assert not told


def test_stages_that_exchange_states_have_one_type(vqvae2_system, tmp_path):
    with pytest.raises(
        VqdeployError, match=r"exchange states of one type; expected fp16 or fp32, found .*top_row=fp16"
    ):
        export(vqvae2_system, tmp_path / "onnx", "top_row=fp16")


# Packages and plans


@pytest.fixture
def int8(artifacts, tmp_path):
    return shutil.copytree(artifacts.package("rqvae", "int8"), tmp_path / "package")


def test_what_a_package_holds(artifacts):
    package = artifacts.package("rqvae", "int8")
    manifest = read(package)
    assert manifest.precision == "int8"
    assert [stage.precision for stage in manifest.stages] == ["fp32", "fp32", "int8"]
    weights = load_file(package / "weights.safetensors")
    matrices = {name for name, weight in weights.items() if weight.dtype == np.int8}
    assert {"body.0.qkv.product.weight", "classifier.product.weight"} <= matrices
    nodes = [node.op_type for node in onnx.load(package / "step.onnx", load_external_data=False).graph.node]
    # Two layers of the body and one of the head at four depths, four products each; a classifier a depth.
    assert nodes.count("QuantizedLinear") == 4 * (2 + 4) + 4
    assert "MatMul" in nodes  # attention within the head is between activations


MOVQ = "decode=fp16,step=int8"


@pytest.mark.slow
def test_precisions_that_differ(artifacts, movq_system):
    manifest = read(artifacts.package("movq", MOVQ))
    assert manifest.precision == MIXED
    assert [stage.precision for stage in manifest.stages] == ["fp32", "fp16", "int8"]
    report = verify(artifacts.plan("movq", MOVQ), movq_system)
    assert failures(report) == set()
    assert report["precision"] == MIXED


def products(plan):
    """The operators of a plan's products in int8, by stage."""
    kinds = ("QuantizedLinear", "QuantizedRowConvolution", "MatMulNBits")
    graphs = {s.name: onnx.load_from_string(bytes(plan.member(s.file))).graph for s in plan.manifest.stages}
    found = {name: {node.op_type for node in graph.node} & {*kinds} for name, graph in graphs.items()}
    return {name: kind for name, kind in found.items() if kind}


def test_few_rows_have_products_by_blocks(artifacts):
    """Their weights are those of the package, in another order, and the plan holds no other."""
    plan, package = Bundle(artifacts.plan("rqvae", "int8")), artifacts.package("rqvae", "int8")
    assert products(plan) == {"step": {"MatMulNBits"}}
    stored = load_file(package / "weights.safetensors")
    graph = onnx.load(package / "step.onnx").graph
    inline = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    step = onnx.load_from_string(bytes(plan.member("step.onnx"))).graph
    tables = {i.name: numpy_helper.to_array(i) for i in step.initializer if not i.external_data} | plan.tensors()
    attributes = [a for node in step.node if node.op_type == "MatMulNBits" for a in node.attribute]
    sizes = [attribute.i for attribute in attributes if attribute.name == "block_size"]
    assert max(sizes) == 64  # larger ones make a row depend on how many there are
    for node in graph.node:
        if node.op_type == "QuantizedLinear":
            weight, scale = (stored.get(name, inline.get(name)) for name in node.input[1:])
            table, scales = (
                next(array for n, array in tables.items() if re.fullmatch(rf"{re.escape(name)}\.bytes_\d+", n))
                for name in node.input[1:]
            )
            floats = (table.astype(np.float32) - 128) * scales[:, :, None]
            np.testing.assert_array_equal(floats.reshape(len(scales), -1).T, weight * scale)
    assert not [name for name, weight in plan.tensors().items() if weight.dtype == np.int8]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "usual"), [("rqvae", 8), ("movq", 1), ("var", 1)])
def test_many_rows_have_products_of_integers(artifacts, name, usual):
    plan = Bundle(artifacts.plan(name, "int8", batch=SizeRange(1, usual, 64)))
    assert products(plan) == {"step": {"QuantizedLinear"}}
    package = read(artifacts.package(name, "int8"))
    assert plan.manifest.members["weights.safetensors"] == package.members["weights.safetensors"]


def test_each_stage_has_products_for_its_rows(artifacts):
    found = products(Bundle(artifacts.plan("vqvae2", "int8")))
    assert "MatMulNBits" in found["top_pixel"] & found["bottom_pixel"]
    assert found["top_row"] == {"QuantizedRowConvolution"}
    assert found["bottom_row"] == {"QuantizedLinear", "QuantizedRowConvolution"}


@pytest.mark.slow
def test_stages_share_their_weights(artifacts):
    """The step multiplies one row, `features` a whole image."""
    plan, package = Bundle(artifacts.plan("vit", "int8")), artifacts.package("vit", "int8")
    assert products(plan) == {"step": {"MatMulNBits"}, "features": {"MatMulNBits"}}
    stored = load_file(package / "weights.safetensors")
    size = sum(weight.nbytes for weight in stored.values())
    assert sum(weight.nbytes for weight in plan.tensors().values()) < size * 1.02


def tampered(change):
    """A step whose graph `change` has edited: it takes the first product in int8, its graph and its initializers."""

    def edit(folder):
        model = onnx.load(folder / "step.onnx", load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type == "QuantizedLinear")
        change(node, model.graph, {i.name: i for i in model.graph.initializer})
        onnx.save(model, folder / "step.onnx")
        reseal(folder)

    return edit


def replace_initializer(place, array):
    def change(node, graph, initializers):
        initializers[node.input[place]].CopyFrom(numpy_helper.from_array(array, node.input[place]))

    return tampered(change)


@pytest.mark.parametrize(
    "edit",
    [
        tampered(lambda node, *_: node.input.pop()),
        tampered(lambda node, *_: node.input.append(node.input[0])),
        tampered(lambda node, *_: node.input.__setitem__(1, node.input[0])),
        tampered(lambda node, *_: node.input.__setitem__(2, node.input[0])),
        replace_initializer(1, np.zeros(64, np.int8)),
        replace_initializer(1, np.zeros((64, 64, 3), np.int8)),
        replace_initializer(1, np.zeros((0, 64), np.int8)),
        replace_initializer(1, np.zeros((64, 64), np.float32)),
        replace_initializer(2, np.ones(63, np.float32)),
        replace_initializer(2, np.ones((64, 1), np.float32)),
        replace_initializer(2, np.ones(64, np.float16)),
    ],
    ids=[
        *("two inputs", "four inputs", "matrix of activations", "scales of activations", "one axis", "three axes"),
        *("no rows", "floats", "too few scales", "scales in two axes", "scales in fp16"),
    ],
)
def test_a_product_that_was_tampered_with(int8, tmp_path, edit):
    """It stays as it is, so that nothing is computed from what it does not mean."""
    edit(int8)
    try:
        build(int8, tmp_path / "plan")
    except VqdeployError:
        return
    assert products(Bundle(tmp_path / "plan"))["step"] == {"MatMulNBits", "QuantizedLinear"}


def test_weights_that_have_the_name_of_another(int8, tmp_path):
    """What `build` would write must not replace a tensor of the package."""
    stored = load_file(int8 / "weights.safetensors")
    save_file(stored | {"classifier.product.weight.bytes_1": np.zeros(3, np.float32)}, int8 / "weights.safetensors")
    reseal(int8)
    build(int8, tmp_path / "plan")
    assert products(Bundle(tmp_path / "plan"))["step"] == {"MatMulNBits", "QuantizedLinear"}


def test_an_empty_tensor_of_a_huge_shape(int8, tmp_path):
    blob = (int8 / "weights.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size]) | {"none": {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (int8 / "weights.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + size :])
    reseal(int8)
    with pytest.raises(ArtifactError, match="the weights cannot be read"):
        build(int8, tmp_path / "plan")


@pytest.mark.slow
def test_weights_that_are_equal_but_for_their_scales(artifacts, tmp_path):
    """The package holds their integers once."""
    system = copy.deepcopy(artifacts.system("rqvae"))
    first, second = [part.mlp[0].weight for part in system.prior.modules() if isinstance(part, Block)][:2]
    with torch.no_grad():
        second.copy_(first * 2)
    export(system, tmp_path / "onnx", "int8")
    graph = onnx.load(tmp_path / "onnx" / "step.onnx", load_external_data=False).graph
    names = [node.input[1] for node in graph.node if node.op_type == "QuantizedLinear" and "mlp" in node.input[1]]
    assert max(Counter(names).values()) >= 2
    build(tmp_path / "onnx", tmp_path / "plan")
    assert failures(verify(tmp_path / "plan", system)) == set()


MANY = {"batch": SizeRange(1, 8, 64)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in ("rqvae", "vit", "vqvae2") for options in ({"portable": True}, {}, MANY)),
        *(("var", options) for options in ({"portable": True}, {})),  # all its products have many rows
    ],
)
def test_a_good_plan_passes(artifacts, name, options):
    report = verify(artifacts.plan(name, "int8", **options), artifacts.system(name))
    assert failures(report) == set()
    assert any("divergence" in check["metric"] for check in report["checks"])


@pytest.mark.parametrize("usual", [1, 8])
def test_an_image_alone_is_the_image_in_a_batch(artifacts, usual):
    pipeline = artifacts.pipeline("rqvae", "int8", batch=SizeRange(1, usual, 64))
    together = pipeline.generate([0, 1, 2], seed=3).codes
    alone = pipeline.generate([1], seed=3, first_image=1).codes
    np.testing.assert_array_equal(alone[0], together[1])


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("classifier.product.scale", lambda scale: np.multiply(scale[:1], 1.5, out=scale[:1])),
        ("body.1.qkv.product.scale", lambda scale: np.multiply(scale, 1.1, out=scale)),
        ("body.0.mlp_out.product.weight", lambda weight: np.copyto(weight, weight // 16 * 16)),
        ("head.0.proj.product.weight", lambda weight: np.copyto(weight, weight[:, ::-1].copy())),
    ],
)
def test_weights_that_are_off_are_found(int8, system, tmp_path, tensor, change):
    change_weight(int8, torch.from_numpy(load_file(int8 / "weights.safetensors")[tensor]), change)
    build(int8, tmp_path / "plan")
    failed(failures(verify(tmp_path / "plan", system)), "step: drawn codes: Kullback-Leibler")


@pytest.mark.parametrize(
    ("output", "source"),
    [("perturbed", "kept"), ("scaled", "logits_fp32"), ("survivors", "scaled"), ("threshold_p", "k_low_3")],
    ids=["noise", "temperature", "top_k", "top_p"],
)
@pytest.mark.parametrize(("name", "dtype"), [("rqvae", "int8"), ("rqvae", "int4"), ("movq", MOVQ)])
def test_sampling_that_ignores_an_option(artifacts, name, dtype, output, source, tmp_path):
    """Draws are judged as strictly as in fp32: by the logits of the plan itself."""
    package = shutil.copytree(artifacts.package(name, dtype), tmp_path / "package")
    change_function(package, "step", "GumbelSample", replace_with(output, "Identity", source))
    failed(failures(verify_package(package, artifacts.system(name))), "generate: truncated")


@pytest.mark.parametrize("share", [2 / 3, 1.5])
def test_another_guidance_scale_is_found(artifacts, share, monkeypatch):
    run = AutoregressiveSampler._run

    def changed(sampler, stage, binding):
        guided = binding.inputs["guidance"] != 1
        binding.inputs["guidance"][guided] *= share
        run(sampler, stage, binding)
        binding.inputs["guidance"][guided] /= share

    monkeypatch.setattr(AutoregressiveSampler, "_run", changed)
    found = failures(verify(artifacts.plan("vit", "int8"), artifacts.system("vit")))
    failed(found, "step: guidance, drawn codes: Kullback-Leibler")


def test_it_runs_without_the_exporter(artifacts):
    with load(artifacts.plan("rqvae", "int8"), threads=1) as pipeline:
        assert pipeline.generate([0]).codes.shape == (1, 4, 4, 4)
