"""Plans of VQ-VAE-2: good ones pass, and whatever is broken in one is found, by the check that names it."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.numpy import load_file
from support.mutations import (
    by_place,
    change_function,
    change_graph,
    change_noise,
    change_weight,
    failed,
    failures,
    replace_with,
)

from vqdeploy.runtime import hierarchical
from vqdeploy.runtime.hierarchical import HierarchicalSampler, _Level
from vqdeploy.runtime.manifest import FILE, WEIGHTS
from vqdeploy.verify import verify, verify_package

pytestmark = pytest.mark.slow

TOP, BOTTOM = "step: top: largest", "step: bottom: largest"


@pytest.fixture
def copy(vqvae2_package, tmp_path):
    return shutil.copytree(vqvae2_package, tmp_path / "package")


def weights_of(folder, stage):
    """The weights of a stage by their names in it."""
    (info,) = [info for info in json.loads((folder / FILE).read_text())["stages"] if info["name"] == stage]
    weights = load_file(folder / WEIGHTS)
    return {name.removeprefix(f"{stage}."): torch.from_numpy(weights[name]) for name in info["weights"]}


def scale(array):
    array *= 1.1


@pytest.mark.parametrize("kind", ["vqvae2_plan", "vqvae2_portable_plan"])
def test_a_good_plan_passes(request, kind, vqvae2_system):
    names = []
    report = verify(request.getfixturevalue(kind), vqvae2_system, names.append)
    assert failures(report) == set()
    assert names == ["encode and decode", "step", "generation"]
    assert {check["stage"] for check in report["checks"]} == {"reference", "encode", "decode", "step", "generate"}
    assert sum(check["metric"].endswith("largest difference of logits") for check in report["checks"]) == 2


def test_three_levels_without_labels_pass(three_plan, three_package, three_system):
    report = verify(three_plan, three_system)
    assert failures(report) == set()
    levels = {check["metric"].split(":")[0] for check in report["checks"] if check["stage"] == "step"}
    assert levels == {f"{level}{drawn}" for level in ("top", "middle1", "bottom") for drawn in ("", ", drawn codes")}
    assert failures(verify_package(three_package, three_system)) == set()


# Weights


@pytest.mark.parametrize(
    ("stage", "name", "found"),
    [
        ("top_pixel", "first.1.weight", TOP),
        ("bottom_pixel", "second.3.weight", BOTTOM),
        ("top_pixel", "exits.1.key_value.product.weight", TOP),
        ("bottom_condition", "condition.blocks.0.conv2.weight", BOTTOM),
        ("top_row", "labels", TOP),
        ("bottom_row", "labels", BOTTOM),
        ("bottom_row", "condition.weight", BOTTOM),
    ],
)
def test_one_weight(copy, vqvae2_system, stage, name, found):
    change_weight(copy, weights_of(copy, stage)[name], scale)
    failing = failures(verify_package(copy, vqvae2_system))
    failed(failing, found)
    other = TOP if found == BOTTOM else BOTTOM
    assert not any(metric.startswith((other, "encode", "decode")) for metric in failing)


@pytest.mark.parametrize("level", ["top", "bottom"])
def test_one_tap_of_a_convolution_over_the_rows_above(copy, vqvae2_system, level):
    weight, *_ = [weight for weight in weights_of(copy, f"{level}_row").values() if weight.ndim > 2]
    change_weight(copy, weight, lambda array: array[:, :, 0, 0].__iadd__(0.1))
    failed(failures(verify_package(copy, vqvae2_system)), f"step: {level}: largest")


@pytest.mark.parametrize("stage", ["top_row", "bottom_pixel", "bottom_condition"])
@pytest.mark.parametrize("row", [0, 6])
def test_a_row_of_the_entry_table(copy, vqvae2_system, stage, row):
    """Row 0 is that of the places off the map, row 6 that of code 5."""
    change_weight(copy, weights_of(copy, stage)["entry.rows"], lambda rows: rows[row, ::2].__iadd__(0.2))
    failed(failures(verify_package(copy, vqvae2_system)), f"step: {stage.split('_')[0]}: largest")


@pytest.mark.parametrize("level", [0, 1])
def test_a_codebook(copy, vqvae2_system, level):
    codebook = vqvae2_system.tokenizer.quantizers[level].codebook
    change_weight(copy, codebook, lambda rows: np.negative(rows[:8], out=rows[:8]))
    failed(failures(verify_package(copy, vqvae2_system)), "encode: codes outside", "decode: largest")


# Graphs


def test_attention_that_lags_behind(copy, vqvae2_system):
    """The key and the value of the place before are written, and seen, a place later."""
    model = onnx.load(copy / "top_pixel.onnx", load_external_data=False)
    first = next(i for i, node in enumerate(model.graph.node) if node.op_type == "CachedAttention")
    for name, value in (("late_by", 1), ("last_place", 8)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    position = model.graph.node[first].input[3]
    model.graph.node.insert(first, helper.make_node("Min", ["late_unbounded", "last_place"], ["late"]))
    model.graph.node.insert(first, helper.make_node("Add", [position, "late_by"], ["late_unbounded"]))
    onnx.save(model, copy / "top_pixel.onnx")

    def change(node):
        if node.op_type != "CachedAttention":
            return None
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[3] = "late"
        return changed

    change_graph(copy, "top_pixel", change)
    found = failures(verify_package(copy, vqvae2_system))
    failed(found, TOP)
    assert not any(name.startswith(BOTTOM) for name in found)


@pytest.mark.parametrize("stage", ["top_pixel", "bottom_pixel"])
def test_a_row_that_is_not_written(copy, vqvae2_system, stage):
    def change(node):
        if node.op_type != "WriteCache" or node.output[0] != "present_row_y":
            return None
        return helper.make_node("Identity", [node.input[0]], node.output)

    change_graph(copy, stage, change)
    failed(failures(verify_package(copy, vqvae2_system)), f"step: {stage.split('_')[0]}: largest")


def test_a_draw_without_noise(copy, vqvae2_system):
    change_function(copy, "bottom_pixel", "GumbelSample", replace_with("perturbed", "Identity", "kept"))
    found = failures(verify_package(copy, vqvae2_system))
    # The step is checked by a sampler that noise forces to given codes, so it shows there too.
    failed(found, "generate: full distribution: tokens", BOTTOM)


# The loop


def broken(plan, system, *expected):
    found = failures(verify(plan, system))
    failed(found, *expected)
    return found


@pytest.mark.parametrize("name", ["present_last.1", "present_left_x", "present_left_y"])
def test_what_a_place_leaves_for_the_next(vqvae2_plan, vqvae2_system, monkeypatch, name):
    carried = hierarchical.carried

    def forgetful(binding):
        states = carried(binding)
        if "past_key.0" in binding.inputs:  # of the top
            del states[name.replace("present", "past")]
        return states

    monkeypatch.setattr(hierarchical, "carried", forgetful)
    found = broken(vqvae2_plan, vqvae2_system, TOP, "generate: full distribution: tokens")
    assert not any(metric.startswith(BOTTOM) for metric in found)


def test_a_row_that_goes_on_from_the_end_of_the_row_before(vqvae2_plan, vqvae2_system, monkeypatch):
    positions = _Level.positions

    def with_leftovers(level, *arguments):
        for row, column, pixel in positions(level, *arguments):
            if row and column == 0:
                pixel.inputs["past_left_x"][:] = pixel.outputs["present_left_x"]
            yield row, column, pixel

    monkeypatch.setattr(_Level, "positions", with_leftovers)
    broken(vqvae2_plan, vqvae2_system, TOP, BOTTOM)


def detached(monkeypatch, kinds):
    """The bindings of a row get buffers of their own for inputs and outputs of some kinds."""
    bound_rows = hierarchical._bound_rows

    class Detached:
        def __init__(self, session):
            self.session, self.stage, self.buffers = session, session.stage, session.buffers

        def bind(self, dims, shared=None):
            shared = {} if shared is None else shared
            return self.session.bind(dims, {n: buffer for n, buffer in shared.items() if not n.startswith(kinds)})

    monkeypatch.setattr(hierarchical, "_bound_rows", lambda row, *others: bound_rows(Detached(row), *others))


@pytest.mark.parametrize("kinds", [("row_x",), ("row_y",), ("above_", "spread_"), ("condition",)])
def test_what_a_row_takes_over(vqvae2_plan, vqvae2_system, monkeypatch, kinds):
    detached(monkeypatch, kinds)
    found = broken(vqvae2_plan, vqvae2_system, BOTTOM, "generate: full distribution: tokens")
    assert any(name.startswith(TOP) for name in found) == (kinds != ("condition",))


@pytest.mark.parametrize("part", ["row", "pixel"])
def test_codes_that_lie_a_column_aside(vqvae2_plan, vqvae2_system, monkeypatch, part):
    runs = _Level if part == "row" else HierarchicalSampler
    run = runs._run

    def shifted(of, stage, binding):
        if stage.endswith(part):
            binding.inputs["codes"][:] = np.roll(binding.inputs["codes"], 1, -1)
        run(of, stage, binding)

    monkeypatch.setattr(runs, "_run", shifted)
    broken(vqvae2_plan, vqvae2_system, BOTTOM)


@pytest.mark.parametrize(
    "change",
    [lambda above: np.roll(above, 1, 2), lambda above: above[::-1].copy()],
    ids=["a column aside", "neighbour"],
)
def test_a_bottom_level_that_follows_another_top_level(vqvae2_plan, vqvae2_system, monkeypatch, change):
    positions = _Level.positions

    def mixed_up(level, codes, above, *others):
        return positions(level, codes, None if above is None else change(above), *others)

    monkeypatch.setattr(_Level, "positions", mixed_up)
    found = broken(vqvae2_plan, vqvae2_system, BOTTOM, "generate: full distribution: tokens")
    assert not any(name.startswith(TOP) for name in found)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda keys: [(s, i, place % 9) for s, i, place in keys], "generate: full distribution: tokens"),
        (lambda keys: [(s, i, max(place - 9, 0)) for s, i, place in keys], "generate: full distribution: tokens"),
        (by_place, "generate: image alone"),
        (lambda keys: [(s + 1, i, place) for s, i, place in keys], "generate: full distribution: tokens"),
    ],
)
def test_noise_that_is_keyed_wrongly(vqvae2_plan, vqvae2_system, monkeypatch, change, expected):
    change_noise(monkeypatch, change)
    found = broken(vqvae2_plan, vqvae2_system, expected)
    assert not any(name.startswith("step:") for name in found)
