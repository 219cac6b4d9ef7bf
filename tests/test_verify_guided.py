"""Plans of GPTs: good ones pass, and whatever is broken in one is found, by the check that names it."""

import shutil
from dataclasses import replace

import onnx
import pytest
from onnx import helper
from support.mutations import change_graph, change_weight, failed, failures
from support.systems import SMALL_VIT, lively

from vqdeploy.runtime import autoregressive
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.verify import verify, verify_package

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(vit_package, tmp_path):
    return shutil.copytree(vit_package, tmp_path / "package")


def test_good_plans_pass(vit_plan, vit_system, vqgan_plan, vqgan_system):
    names = []
    report = verify(vit_plan, vit_system, names.append)
    assert failures(report) == set()
    assert names == ["encode and decode", "step", "features", "generation"]
    assert {check["stage"] for check in report["checks"]} == {
        "reference",
        "encode",
        "decode",
        "step",
        "features",
        "generate",
    }
    assert failures(verify(vqgan_plan, vqgan_system)) == set()


@pytest.mark.slow
def test_a_good_plan_of_as_many_codes_as_published_passes(artifacts):
    """32x32, at a small width."""
    prior = replace(SMALL_VIT.prior, grid=(32, 32, 1), width=32, layers=1, heads=2)
    system = lively(replace(SMALL_VIT, tokenizer=replace(SMALL_VIT.tokenizer, resolution=128), prior=prior))
    assert failures(verify(artifacts.plan(system), system)) == set()


def test_a_class_embedding(copy, vit_system):
    labels = (vit_system.prior.tok_emb_cond.weight + vit_system.prior.pos_emb_cond[0]).detach()
    change_weight(copy, labels, lambda rows: rows[:3, ::2].__iadd__(0.05))
    found = failures(verify_package(copy, vit_system))
    failed(found, "step: cached step: largest", "features: largest", "generate: full distribution")


def test_the_embedding_of_no_label(copy, vit_system):
    """Only guidance and features without a label see it."""
    labels = (vit_system.prior.tok_emb_cond.weight + vit_system.prior.pos_emb_cond[0]).detach()
    change_weight(copy, labels, lambda rows: rows[3, ::2].__iadd__(0.5))
    found = failures(verify_package(copy, vit_system))
    failed(found, "features: largest", "step: guidance: largest", "generate: full distribution: tokens outside")
    assert not any(name.startswith(("step: cached", "step: prefix", "step: drawn")) for name in found)


def test_the_place_of_the_last_position(copy, vit_system):
    change_weight(copy, vit_system.prior.pos_emb_code[0], lambda rows: rows[14, ::2].__iadd__(0.1))
    failed(failures(verify_package(copy, vit_system)), "step: cached step: largest", "step: prefix: largest")


def test_features_of_later_positions_fail(copy, vit_system):
    def change(node):
        if node.op_type == "Softmax":
            raw = next(n for n in graph.node if node.input[0] in n.output)
            return helper.make_node("Softmax", [raw.input[2]], node.output, axis=-1)
        return None

    graph = onnx.load(copy / "features.onnx", load_external_data=False).graph
    change_graph(copy, "features", change)
    assert failures(verify_package(copy, vit_system)) == {"features: largest difference of averaged states"}


def test_guidance_that_is_ignored(copy, vit_system):
    model = onnx.load(copy / "step.onnx", load_external_data=False)
    model.graph.node.insert(0, helper.make_node("Div", ["guidance", "guidance"], ["no_guidance"]))
    onnx.save(model, copy / "step.onnx")

    def change(node):
        if "guidance" not in node.input or node.op_type == "Div":
            return None
        return helper.make_node(node.op_type, ["no_guidance", *node.input[1:]], node.output)

    change_graph(copy, "step", change)
    found = failures(verify_package(copy, vit_system))
    failed(found, "step: guidance: largest", "generate: full distribution: tokens outside")
    without = ("step: cached", "step: prefix", "step: drawn", "generate: truncated")
    assert not any(name.startswith(without) for name in found)


def test_guidance_from_the_wrong_row(vit_plan, vit_system, monkeypatch):
    run = AutoregressiveSampler._run

    def swapped(sampler, stage, binding):
        binding.inputs["partner"][:] = 0
        run(sampler, stage, binding)

    monkeypatch.setattr(AutoregressiveSampler, "_run", swapped)
    failed(failures(verify(vit_plan, vit_system)), "step: guidance", "generate: full distribution: tokens")


def test_a_token_shift_that_is_forgotten(vqgan_plan, vqgan_system, monkeypatch):
    """What the public sampler does."""
    monkeypatch.setattr(autoregressive, "carried", lambda binding: {})
    found = failures(verify(vqgan_plan, vqgan_system))
    failed(found, "step: cached step: largest", "generate: full distribution: tokens")
