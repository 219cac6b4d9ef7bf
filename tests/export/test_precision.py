"""What a package in fp16 holds."""

import re

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from support.systems import SMALL, lively

from vqdeploy.checkpoint import digest
from vqdeploy.engines.package import read
from vqdeploy.errors import VqdeployError
from vqdeploy.export.maskgit import stages
from vqdeploy.export.package import export
from vqdeploy.export.precision import in_precision
from vqdeploy.export.stage import Stage
from vqdeploy.export.tokenizer import Encode
from vqdeploy.runtime.manifest import WEIGHTS

SYSTEMS = ("", "movq_", "vit_", "vqgan_", "vqvae2_", "var_")
FLOATS = {"noise", "choice_noise", "guidance", "temperature", "top_p", "choice_temperature", "share"}
SUMS = {"past_map", "present_map", "whole_map"}  # of code vectors, as exact as the codebook
STATES = ("past_", "present_", "row_", "above_", "spread_")


@pytest.fixture(params=SYSTEMS, ids=lambda name: name.strip("_") or "rqvae")
def pair(request):
    """A system and its package in fp16."""
    get = request.getfixturevalue
    return get(f"{request.param}system"), get(f"{request.param}half_package")


def of_sums(name, system):
    """Whether a weight belongs to a quantizer that sums maps; the exporter names parts of its matrices."""
    return system.config.model == "var" and bool(re.search(r"quantizer\.|(permute|slice)_\d+$", name))


def test_weights_are_half_but_for_the_codebooks(pair):
    system, package = pair
    weights = load_file(package / WEIGHTS)
    codebooks = [b.numpy() for name, b in system.tokenizer.named_buffers() if name.endswith("codebook")]
    for name, weight in weights.items():
        if weight.dtype == np.float32 and not of_sums(name, system):  # cosine takes the directions of a codebook too
            assert weight.shape in [codebook.shape for codebook in codebooks], name
    for codebook in codebooks:
        assert any(weight.dtype == np.float32 and np.array_equal(weight, codebook) for weight in weights.values())


def test_the_types_of_inputs_and_outputs(pair):
    for stage in read(pair[1]).stages:
        for info in (*stage.inputs, *stage.outputs):
            if info.name == "image":
                assert info.dtype == "uint8"
            elif info.name in FLOATS | SUMS | {"logits", "features"}:
                assert info.dtype == "float32", info.name
            elif info.name.startswith(STATES) or info.name in ("entry", "inner", "gates", "condition"):
                assert info.dtype == "float16", info.name
            else:
                assert info.dtype == "int64", info.name


def test_the_checker_accepts_every_graph(pair):
    for stage in read(pair[1]).stages:
        onnx.checker.check_model(pair[1] / stage.file, full_check=True)


def test_the_package_says_so_and_is_half_as_large(package, half_package, system):
    assert read(half_package).precision == "fp16"
    assert read(half_package).provenance.checkpoint == digest(system)
    properties = onnx.load(half_package / "step.onnx", load_external_data=False).metadata_props
    assert {entry.key: entry.value for entry in properties}["precision"] == "fp16"
    sizes = [(folder / WEIGHTS).stat().st_size for folder in (package, half_package)]
    assert 0.5 < sizes[1] / sizes[0] < 0.53


def test_the_system_stays_as_it_was(half_package, system):
    assert {weight.dtype for weight in system.state_dict().values()} == {torch.float32}


def test_images_are_cast_first_and_last(half_package):
    """TensorRT does nothing else with uint8."""
    for stage in ("encode", "decode"):
        graph = onnx.load(half_package / f"{stage}.onnx", load_external_data=False).graph
        touching = [node.op_type for node in graph.node if "image" in (*node.input, *node.output)]
        assert touching == ["Cast"]


def test_norms_sum_in_fp32(half_package, movq_half_package):
    for package in (half_package, movq_half_package):
        for stage in read(package).stages:
            model = onnx.load(package / stage.file, load_external_data=False)
            types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
            for node in (node for node in model.graph.node if "Norm" in node.op_type):
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert attributes.get("stash_type") == 1 or types[node.input[0]] == onnx.TensorProto.FLOAT, node


def test_a_stage_runs_in_pytorch_too(system):
    """No layer reads another type than that of its weights."""
    image = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    stage = Stage("encode", Encode(system.tokenizer), {"image": image}, ["codes"])
    half = in_precision(stage, "fp16").module
    assert half.tokenizer.encoder.conv_in.weight.dtype == torch.float16
    assert (half(image) == stage.module(image)).float().mean() > 0.95
    assert in_precision(stage, "fp32").module is stage.module


@torch.no_grad()
def test_an_adaptive_prior(adaptive_system):
    stage = next(stage for stage in stages(adaptive_system.prior) if stage.name == "step")
    stage.inputs["guidance"] = torch.tensor([[1.0, 0.0], [1.5, -0.5]])
    half = in_precision(stage, "fp16")
    assert all(torch.equal(x, stage.inputs[name]) for name, x in half.inputs.items())
    expected, found = (each.module(*each.inputs.values())[2] for each in (stage, half))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 5e-3 * expected.abs().max()


def test_rows_take_few_products(vqvae2_package, vqvae2_half_package):
    """Minimal filtering of eight products loses two bits more, see `docs/precision.md`."""
    shapes = [read(package).stage("top_row").outputs[3].shape for package in (vqvae2_package, vqvae2_half_package)]
    assert [shape[2] // shapes[1][2] * 4 for shape in shapes] == [8, 4]  # kernel 3: products of two outputs


@pytest.mark.parametrize("dtype", ["bf16", "int3", "FP16", ""])
def test_another_precision_is_refused(system, tmp_path, dtype):
    with pytest.raises(VqdeployError, match="unsupported precision; expected fp32 or fp16 or int8") as caught:
        export(system, tmp_path / "onnx", dtype)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_does_not_fit_is_refused(tmp_path):
    system = lively(SMALL)
    with torch.no_grad():
        system.tokenizer.encoder.conv_in.weight[0, 0, 0, 0] = 7e4
    with pytest.raises(VqdeployError, match=r"a weight does not fit fp16; expected at most 6.55e\+04, found 7e\+04"):
        export(system, tmp_path / "a-onnx", dtype="fp16")
    assert not list(tmp_path.iterdir())
