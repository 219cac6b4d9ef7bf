"""Products in 4 bits: the rounding, the operator in all its forms, what is refused, and whole plans."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file
from support.mutations import change_weight, failed, failures

from vqdeploy.engines.bodies_onnxrt import swap_in
from vqdeploy.engines.build import build
from vqdeploy.engines.package import read
from vqdeploy.engines.tensorrt import _use_int4
from vqdeploy.errors import VqdeployError
from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.export.layers import Product
from vqdeploy.export.package import export, stages_of
from vqdeploy.export.precision import BlockQuantizedProduct, QuantizedProduct
from vqdeploy.export.rounding import BLOCK, observed, rounded
from vqdeploy.runtime import load
from vqdeploy.verify import verify


def session(weight, scale, own):
    """A graph of one node in ONNX Runtime, with its own operator or the portable function body."""
    model = graph_of(weight, scale)
    if own:
        swap_in(model, 0)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def graph_of(weight, scale):
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(scale, "scale")]
    node = helper.make_node("BlockQuantizedLinear", ["x", "weight", "scale"], ["y"], domain=DOMAIN)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", BLOCK * scale.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", len(scale)])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "graph", [x], [y], constants)
    functions = [function("BlockQuantizedLinear")]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def example(rows, blocks, outputs, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, blocks * BLOCK), dtype=np.float32)
    x *= rng.lognormal(0, 2, (rows, 1)).astype(np.float32)
    weight = rng.integers(0, 256, (outputs, blocks, BLOCK // 2), dtype=np.uint8)
    return x, weight, rng.lognormal(-3, 1, (outputs, blocks)).astype(np.float32)


def table(weight, scale):
    """The matrix [inputs, outputs] in fp64, number by number."""
    result = np.zeros((weight.shape[1] * BLOCK, len(weight)))
    for output, block, pair in np.ndindex(weight.shape):
        byte = int(weight[output, block, pair])
        for place, integer in enumerate((byte % 16, byte // 16)):
            result[block * BLOCK + 2 * pair + place, output] = (integer - 8) * scale[output, block]
    return result


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 20), st.integers(0, 1000))
def test_all_forms(rows, blocks, outputs, seed):
    x, weight, scale = example(rows, blocks, outputs, seed)
    matrix = table(weight, scale)
    exact, size = x.astype(np.float64) @ matrix, np.abs(x).astype(np.float64) @ np.abs(matrix)
    (portable,) = ReferenceEvaluator(graph_of(weight, scale)).run(None, {"x": x})
    assert (np.abs(portable - exact) <= 1e-5 * size).all()
    found = torch.ops.vqdeploy.block_quantized_product(*map(torch.from_numpy, (x, weight, scale)))
    assert (np.abs(found.numpy() - exact) <= 1e-5 * size).all()
    (body,) = session(weight, scale, own=False).run(None, {"x": x})
    assert (np.abs(body - exact) <= 1e-5 * size).all()
    parsed = graph_of(weight, scale)
    _use_int4(parsed.graph, Path())
    (int4,) = ReferenceEvaluator(parsed).run(None, {"x": x})
    assert (np.abs(int4 - exact) <= 1e-5 * size).all()
    (own,) = session(weight, scale, own=True).run(None, {"x": x})
    by_block = np.abs(x).reshape(rows, blocks, BLOCK).max(2).repeat(BLOCK, 1)
    # Activations are rounded to a 127th of the largest of their block.
    assert (np.abs(own - exact) <= (by_block / 127 * 0.51) @ np.abs(matrix) + 1e-5 * size).all()


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(rows, blocks, outputs, seed):
    """Their number decides the kernel, and on CPUs without VNNI the order in which it adds up the blocks."""
    x, weight, scale = example(rows, blocks, outputs, seed)
    own = session(weight, scale, own=True)
    (together,) = own.run(None, {"x": x})
    i = seed % rows
    largest = np.abs(x[i]).reshape(blocks, BLOCK).max(1).repeat(BLOCK)
    rounding = blocks * 2**-23 * (largest @ np.abs(table(weight, scale)))
    assert (np.abs(own.run(None, {"x": x[i : i + 1]})[0][0] - together[i]) <= rounding).all()
    others = np.full_like(x, 1e6)
    others[i] = x[i]
    np.testing.assert_array_equal(own.run(None, {"x": others})[0][i], together[i])


@pytest.mark.parametrize("own", [False, True])
def test_a_row_of_zeros(own):
    x, weight, scale = example(4, 2, 48)
    x[1] = 0
    (found,) = session(weight, scale, own).run(None, {"x": x})
    assert (found[1] == 0).all()
    assert np.isfinite(found).all()


# The rounding


def error(weight, integers, scale, x):
    return (x @ (integers * scale.repeat_interleave(BLOCK, 0) - weight)).square().mean()


def test_what_is_known_of_inputs_makes_the_outputs_closer():
    torch.manual_seed(0)
    mixed = torch.randn(40, 128)
    weight, x, fresh = torch.randn(128, 48), torch.randn(1000, 40) @ mixed, torch.randn(1000, 40) @ mixed
    known, unknown = rounded(weight, x.T @ x), rounded(weight, None)
    assert error(weight, *known, fresh) < 0.2 * error(weight, *unknown, fresh)


def test_without_it_each_weight_is_rounded_to_the_nearest():
    torch.manual_seed(0)
    weight = torch.randn(64, 40) * torch.logspace(-4, 4, 40)
    weight[:, 7] = 0
    integers, scale = rounded(weight, None)
    steps = scale.repeat_interleave(BLOCK, 0)
    assert ((integers * steps - weight).abs() <= 0.5001 * steps).all()
    assert (integers.dtype, integers.min(), integers.max()) == (torch.int8, -8, 7)
    assert (scale > 0).all()


@pytest.mark.parametrize("moment", [torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64) * 1e20])
def test_inputs_that_say_little(moment):
    weight = torch.randn(64, 8)
    integers, scale = rounded(weight, moment)
    assert scale.isfinite().all()
    assert (integers * scale.repeat_interleave(BLOCK, 0) - weight).abs().max() < 2


def test_a_product_holds_what_was_rounded():
    torch.manual_seed(0)
    weight = torch.randn(96, 40)
    product = BlockQuantizedProduct(Product(weight))
    integers, scale = rounded(weight, None)
    np.testing.assert_allclose(
        table(product.weight.numpy(), product.scale.numpy()), integers * scale.repeat_interleave(BLOCK, 0), rtol=1e-6
    )


def test_layers_are_observed_for_a_while(system):
    layer = system.prior.body_transformer.blocks[0].mlp[2]
    inputs = []
    hook = layer.register_forward_pre_hook(  # not while codes are drawn
        lambda layer, x: inputs.append(x[0].flatten(0, -2)) if layer._forward_hooks else None
    )
    with observed(system):
        moment = layer.moment
    hook.remove()
    rows = torch.cat(inputs)
    assert len(rows) > 2 * layer.in_features
    torch.testing.assert_close(moment, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert not any("moment" in vars(part) for part in system.prior.modules())
    assert not any(part._forward_pre_hooks for part in system.prior.modules())


def test_what_ends_an_observation_leaves_nothing(system, monkeypatch, tmp_path):
    monkeypatch.setattr(type(system.prior), "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), observed(system):
        pass
    with pytest.raises(ZeroDivisionError):
        export(system, tmp_path / "onnx", "int8")
    for part in system.prior.modules():
        assert not {"moment", "largest"} & set(vars(part))
        assert not part._forward_hooks


def test_dropout_does_not_count(artifacts):
    system = copy.deepcopy(artifacts.system("vit"))
    for part in system.prior.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5

    def moment():
        with observed(system):
            return system.prior.transformer.blocks[1].mlp[0].moment

    expected = moment()
    system.prior.train()
    torch.testing.assert_close(moment(), expected)
    assert system.prior.training


def test_weights_that_are_not_finite_are_refused(artifacts, tmp_path):
    system = copy.deepcopy(artifacts.system("vit"))
    with torch.no_grad():
        system.prior.head.weight[0, 0] = torch.nan
    with pytest.raises(VqdeployError, match=r"head\.weight in the prior is not finite"):
        export(system, tmp_path / "onnx", "int8")


# The choice


def kinds(system, dtype, stage):
    """The kind of each product of a stage."""
    (found,) = (each for each in stages_of(system, dtype) if each.name == stage)
    forms = (Product, QuantizedProduct, BlockQuantizedProduct)
    return {name: type(part) for name, part in found.module.named_modules() if isinstance(part, forms)}


def test_products_that_need_more_bits_have_8(vit_system):
    found = kinds(vit_system, "features=int8,step=int4", "step")
    assert found.pop("head.product") is QuantizedProduct
    assert set(found.values()) == {BlockQuantizedProduct}
    assert set(kinds(vit_system, "features=int8,step=int4", "features").values()) == {QuantizedProduct}


def test_a_stage_without_products_of_4_bits_is_in_int8(three_system, tmp_path):
    precisions = {stage.name: stage.precision for stage in stages_of(three_system, "int4")}
    assert (precisions["top_row"], precisions["top_pixel"]) == ("int8", "int4")
    message = "all products of stage top_row need 8 bits. Fix: --dtype top_row=int8"
    with pytest.raises(VqdeployError, match=re.escape(message)):
        export(three_system, tmp_path / "onnx", "top_row=int4")


def test_products_with_inputs_that_make_no_blocks_have_8(three_system):
    found = kinds(three_system, "int4", "top_pixel")
    assert set(found.values()) == {Product, QuantizedProduct, BlockQuantizedProduct}
    assert found["out.product"] is Product


@pytest.mark.parametrize("dtype", ["int4", "step=int4"])
def test_masked_priors_have_none(movq_system, tmp_path, dtype):
    with pytest.raises(VqdeployError, match=r"int4 is slower than int8 for a masked prior, .* Fix: --dtype int8"):
        export(movq_system, tmp_path / "onnx", dtype)
    assert not list(tmp_path.iterdir())


def test_activations_that_overflow_have_no_moments(artifacts, tmp_path):
    system = copy.deepcopy(artifacts.system("vit"))
    with torch.no_grad():
        next(part for part in system.prior.modules() if isinstance(part, torch.nn.Linear)).weight.fill_(1e38)
    with pytest.raises(VqdeployError, match=r"activations are too large to round weights .* Fix: --dtype fp32"):
        export(system, tmp_path / "onnx", "int4")
    assert not list(tmp_path.iterdir())


def test_stages_without_products_have_none(system, tmp_path):
    message = "stage decode has nothing to store in int4; expected products. Fix: leave out decode=int4"
    with pytest.raises(VqdeployError, match=re.escape(message)):
        export(system, tmp_path / "onnx", "decode=int4")


# Packages and plans


def test_what_a_package_holds(artifacts):
    package = artifacts.package("rqvae", "int4")
    manifest = read(package)
    assert manifest.precision == "int4"
    assert [stage.precision for stage in manifest.stages] == ["fp32", "fp32", "int4"]
    weights = load_file(package / "weights.safetensors")
    assert weights["body.0.mlp_out.product.weight"].shape == (64, 8, 16)
    assert weights["body.0.mlp_out.product.scale"].shape == (64, 8)
    assert weights["classifier.product.weight"].dtype == np.int8
    nodes = [node.op_type for node in onnx.load(package / "step.onnx", load_external_data=False).graph.node]
    # Two layers of the body and one of the head at four depths, four products each; a classifier a depth.
    assert (nodes.count("BlockQuantizedLinear"), nodes.count("QuantizedLinear")) == (4 * (2 + 4), 4)


def test_a_plan_holds_the_weights_once(artifacts):
    stored = load_file(artifacts.package("rqvae", "int4") / "weights.safetensors")
    with load(artifacts.plan("rqvae", "int4"), threads=1) as pipeline:
        weights = pipeline.bundle.tensors()
        graph = onnx.load_from_string(bytes(pipeline.bundle.member("step.onnx"))).graph
    inputs = [node.input[1] for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(inputs) == 4 * (2 + 4) + 4  # with the classifier, in 8 bits
    assert set(inputs) <= {initializer.name for initializer in graph.initializer}
    assert set(stored) ^ set(weights) == {
        *("classifier.product.weight", "classifier.product.weight.bytes_1"),
        *("classifier.product.scale", "classifier.product.scale.bytes_1"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
@pytest.mark.parametrize("name", ["rqvae", "vit", "vqvae2", "text"])
def test_a_good_plan_passes(artifacts, name, portable):
    report = verify(artifacts.plan(name, "int4", portable=portable), artifacts.system(name))
    assert failures(report) == set()
    assert any("divergence" in check["metric"] for check in report["checks"])


def test_an_image_alone_is_the_image_in_a_batch(artifacts):
    pipeline = artifacts.pipeline("rqvae", "int4")
    together = pipeline.generate([0, 1, 2], seed=3).codes
    alone = pipeline.generate([1], seed=3, first_image=1).codes
    np.testing.assert_array_equal(alone[0], together[1])


@pytest.fixture
def int4(artifacts, tmp_path):
    return shutil.copytree(artifacts.package("rqvae", "int4"), tmp_path / "package")


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (r".*\.product\.scale", lambda scale: np.multiply(scale, 1.1, out=scale)),
        (r"head\.0\.mlp_in\.product\.scale", lambda scale: np.multiply(scale[:, :1], 1.5, out=scale[:, :1])),
        (r"head\.0\.proj\.product\.weight", lambda weight: np.copyto(weight, weight[:, ::-1].copy())),
        (r"body\.0\.mlp_out\.product\.weight", lambda weight: np.copyto(weight, weight >> 4 | weight << 4)),
        (r"body\.1\.qkv\.product\.weight", lambda weight: np.copyto(weight, weight ^ 0x88)),
    ],
    ids=["scales", "scales of a block", "blocks", "halves of bytes", "signed"],
)
def test_weights_that_are_off_are_found(int4, system, tmp_path, names, change):
    for name, weight in load_file(int4 / "weights.safetensors").items():
        if re.fullmatch(names, name):
            change_weight(int4, torch.from_numpy(weight), change)
    build(int4, tmp_path / "plan")
    failed(failures(verify(tmp_path / "plan", system)), "step: drawn codes: Kullback-Leibler")
