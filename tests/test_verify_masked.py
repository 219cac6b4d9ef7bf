"""A good plan of a masked prior passes, and whatever is broken in one is found, by the check that names it."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import helper
from support.mutations import (
    by_place,
    change_function,
    change_noise,
    change_weight,
    failed,
    failures,
    replace_with,
    reseal,
)

from vqdeploy.engines.build import build
from vqdeploy.runtime import masked, schedules
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.runtime.masked import MaskedSampler
from vqdeploy.verify import verify, verify_package

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(movq_package, tmp_path):
    return shutil.copytree(movq_package, tmp_path / "package")


def change_node(folder, stage, operator, change):
    """Changes the last node of an operator in the graph of a stage."""
    model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    change([node for node in model.graph.node if node.op_type == operator][-1])
    onnx.save(model, folder / f"{stage}.onnx")
    reseal(folder)


@pytest.mark.parametrize("kind", ["movq_plan", "movq_portable_plan"])
def test_a_good_plan_passes(request, kind, movq_system):
    names = []
    report = verify(request.getfixturevalue(kind), movq_system, names.append)
    assert failures(report) == set()
    assert names == ["encode and decode", "step", "generation"]
    assert {check["stage"] for check in report["checks"]} == {"reference", "encode", "decode", "step", "generate"}


def test_an_adaptive_prior_passes(adaptive_package, adaptive_system):
    assert failures(verify_package(adaptive_package, adaptive_system)) == set()


def test_a_plan_that_splits_requests_passes(movq_package, movq_system, tmp_path):
    """At published sizes each image is a call of its own."""
    build(movq_package, tmp_path / "a.plan", batch=SizeRange(1, 1, 3))
    assert failures(verify(tmp_path / "a.plan", movq_system)) == set()


# Broken graphs


def test_a_codebook_that_moved(copy, movq_system):
    change_weight(copy, movq_system.tokenizer.quantizer.codebook, lambda w: np.negative(w[:8], out=w[:8]))
    failed(failures(verify_package(copy, movq_system)), "encode: codes outside", "decode: largest")


def test_a_head_that_is_off(copy, movq_system):
    change_weight(copy, movq_system.prior.head.weight.T, lambda w: np.multiply(w, 1.01, out=w))
    failed(failures(verify_package(copy, movq_system)), "step: one label: largest", "step: guidance: largest")


def test_a_table_of_one_channel_used_for_all(copy, movq_system):
    """The offsets of the channels' tables are a small constant, and stay in the graph."""
    model = onnx.load(copy / "step.onnx", load_external_data=False)
    rows = movq_system.config.prior.codebook_size + 1
    (offsets,) = [i for i in model.graph.initializer if i.name.endswith("codes_first")]
    assert onnx.numpy_helper.to_array(offsets).tolist() == [0, rows, 2 * rows, 3 * rows]
    offsets.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.int64), offsets.name))
    onnx.save(model, copy / "step.onnx")
    reseal(copy)
    failed(failures(verify_package(copy, movq_system)), "step: one label: largest")


def test_codes_of_most_confidence_masked_again(copy, movq_system):
    def descend(node):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("largest", 1))

    change_node(copy, "step", "TopK", descend)
    failed(failures(verify_package(copy, movq_system)), "generate: full distribution: codes masked")


def test_ties_at_the_cut_lost(copy, movq_system):
    """`confidence <= cut` in place of `<` masks one code more."""

    def loosen(node):
        node.op_type = "LessOrEqual"

    change_node(copy, "step", "Less", loosen)
    found = failures(verify_package(copy, movq_system))
    failed(found, "generate: full distribution: codes masked", "generate: by order, guided: codes masked")


def test_a_draw_without_noise(copy, movq_system):
    change_function(copy, "step", "GumbelSample", replace_with("perturbed", "Identity", "kept"))
    failed(failures(verify_package(copy, movq_system)), "generate: full distribution: tokens")


def test_a_temperature_left_out(copy, movq_system):
    change_function(copy, "step", "GumbelSample", replace_with("scaled", "Identity", "logits_fp32"))
    found = failures(verify_package(copy, movq_system))
    failed(found, "generate: truncated, guided: tokens")
    assert not any("full distribution" in name for name in found)


def test_the_wrong_metric(copy, movq_system):
    change_function(copy, "encode", "VQNearest", replace_with("scores", "Identity", "products"))
    failed(failures(verify_package(copy, movq_system)), "encode: codes outside")


# A broken loop


def test_counts_that_are_off_by_one(movq_plan, movq_system, monkeypatch):
    counts = masked.masked_counts
    monkeypatch.setattr(masked, "masked_counts", lambda *args: np.maximum(counts(*args) - 1, 0))
    failed(failures(verify(movq_plan, movq_system)), "generate: full distribution: codes masked")


def test_the_wrong_schedule(movq_plan, movq_system, monkeypatch):
    monkeypatch.setitem(schedules._SHARES, "cosine", schedules._SHARES["linear"])
    failed(failures(verify(movq_plan, movq_system)), "generate: full distribution: codes masked")


def test_rows_and_columns_of_the_order_swapped(movq_plan, movq_system, monkeypatch):
    order = schedules.halton_order

    def swapped(height, width):
        return order(width, height) % height * width + order(width, height) // height

    monkeypatch.setattr(schedules, "halton_order", swapped)
    found = failures(verify(movq_plan, movq_system))
    failed(found, "generate: by order, guided: codes masked")
    assert not any("full distribution" in name for name in found)


def test_noise_on_the_choice_that_does_not_fade(movq_plan, movq_system, monkeypatch):
    monkeypatch.setattr(masked, "choice_temperature", lambda start, step, steps: start)
    failed(failures(verify(movq_plan, movq_system)), "generate: full distribution: codes masked")


def test_noise_of_another_step(movq_plan, movq_system, monkeypatch):
    change_noise(monkeypatch, lambda keys: [(seed, image, step + 2) for seed, image, step in keys])
    failed(failures(verify(movq_plan, movq_system)), "generate: full distribution: tokens")


def test_noise_that_depends_on_the_batch(movq_plan, movq_system, monkeypatch):
    change_noise(monkeypatch, by_place)
    failed(failures(verify(movq_plan, movq_system)), "generate: image alone")


def test_settled_codes_drawn_again(movq_plan, movq_system, monkeypatch):
    init = MaskedSampler.__init__

    def forgetful(sampler, *arguments):
        init(sampler, *arguments)
        inputs = sampler._binding.inputs
        inputs["given"][:] = movq_system.config.prior.codebook_size
        inputs["given"] = inputs["given"].copy()  # what the loop writes never reaches the engine

    monkeypatch.setattr(MaskedSampler, "__init__", forgetful)
    failed(failures(verify(movq_plan, movq_system)), "generate: full distribution: tokens")


def test_guidance_that_pulls_away(movq_plan, movq_system, monkeypatch):
    admit = MaskedSampler._admit

    def reversed_labels(sampler, slot, item):
        admit(sampler, slot, item)
        labels = sampler._binding.inputs["label"]
        labels[slot] = labels[slot, ::-1].copy()

    monkeypatch.setattr(MaskedSampler, "_admit", reversed_labels)
    found = failures(verify(movq_plan, movq_system))
    failed(found, "generate: by order, guided: tokens")
    assert not any("full distribution" in name for name in found)
