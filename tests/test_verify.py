"""A good plan passes, and whatever is broken in one is found, by the check that names it."""

import json
import math
import shutil
from copy import deepcopy as copy_module
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
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
from vqdeploy.errors import VqdeployError
from vqdeploy.export.functions import parse
from vqdeploy.precision import PRECISIONS
from vqdeploy.runtime.manifest import FILE, SizeRange
from vqdeploy.verify import table, verify, verify_package
from vqdeploy.verify.checks import at_most, compare_distributions, tolerance_of

pytestmark = pytest.mark.slow
INT8 = PRECISIONS["int8"].limits


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "package")


@pytest.mark.parametrize("kind", ["plan", "portable_plan"])
def test_a_good_plan_passes(request, kind, system):
    names = []
    report = verify(request.getfixturevalue(kind), system, names.append)
    assert failures(report) == set()
    assert names == ["encode and decode", "step", "generation"]
    assert {check["stage"] for check in report["checks"]} == {"encode", "decode", "step", "generate", "reference"}
    assert set(report["checks"][0]) == {"stage", "metric", "value", "limit", "passed"}
    assert json.loads(json.dumps(report)) == report


def test_a_good_package_passes(package, system):
    assert failures(verify_package(package, system)) == set()


@pytest.mark.parametrize("name", ["rqvae", "vqvae2", "features"])
def test_a_plan_that_splits_requests_passes(artifacts, name, tmp_path):
    build(artifacts.package(name), tmp_path / "a.plan", batch=SizeRange(1, 1, 1))
    assert failures(verify(tmp_path / "a.plan", artifacts.system(name))) == set()


def test_a_reference_that_overflows_fails(artifacts, system):
    """Both sides turn NaN into the same bytes and codes."""
    broken = copy_module(system)
    with torch.no_grad():
        broken.tokenizer.decoder.norm_out.weight.fill_(3e38)
    failed(failures(verify(artifacts.plan(broken), broken)), "reference: largest number that leaves a layer")


def test_nan_and_infinity_fail_and_are_valid_json():
    for value in (float("nan"), float("inf")):
        check = at_most("step", "logits", value, 1.0)
        assert not check.passed
        assert json.loads(json.dumps(asdict(check), allow_nan=False))["value"] > 1e300
        check = at_most("step", "logits", 1.0, value)
        assert not check.passed
        assert json.loads(json.dumps(asdict(check), allow_nan=False))["limit"] > 1e300
    assert tolerance_of([at_most("step", "largest difference of logits", float("nan"), 0.5)]) == 1.0


def test_distributions_by_hand():
    """Of two codes: 0.6 and 0.4 in place of 0.5 and 0.5; then of three, the best of which changed at one of two."""
    found, wanted = torch.tensor([[[0.6, 0.4]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    for scale in (1.0, 3.0):
        checks = {check.metric: check for check in compare_distributions("a", found, wanted, INT8, scale)}
        divergence, variation = checks["a: Kullback-Leibler divergence"], checks["a: total variation distance"]
        assert divergence.value == pytest.approx(0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4), rel=1e-6)
        assert divergence.limit == pytest.approx(scale**2 * INT8.divergence)
        assert variation.value == pytest.approx(0.1, rel=1e-6)
        assert variation.limit == pytest.approx(scale * INT8.variation)
    wanted = torch.tensor([[[4.0, 0.0, 0.0]], [[4.0, 0.0, 0.0]], [[0.1, 0.0, 0.0]]])
    found = wanted.clone()
    found[0, 0] = torch.tensor([0.0, 1.0, 0.0])  # a mean difference of 5 / 9 in all; margins of 4, 4 and 0.1
    found[2, 0] = torch.tensor([0.1, 0.2, 0.0])
    clear = compare_distributions("a", found, wanted, INT8)[0]
    assert clear.metric == "a: share of clear top-1 codes that differ"
    assert (clear.value, clear.passed) == (0.5, False)


@pytest.mark.parametrize("metric", ["divergence", "variation", "clear"])
def test_each_limit_of_distributions_decides(metric):
    """A plan passes just within its limit, and fails just beyond it."""
    limits = replace(INT8, divergence=1e9, variation=1e9, clear=1e9)
    wanted = torch.tensor([0.0, 9.0]).expand(20, 1, 2)
    found = torch.cat([torch.tensor([[[1.0, 0.0]]]), wanted[1:]])
    names = {"divergence": "divergence", "variation": "variation", "clear": "clear top-1"}
    value = next(c.value for c in compare_distributions("a", found, wanted, limits) if names[metric] in c.metric)
    for limit, passes in ((value, True), (0.999 * value, False)):
        checks = compare_distributions("a", found, wanted, replace(limits, **{metric: limit}))
        assert all(check.passed for check in checks) == passes


def test_the_table_tells_what_failed():
    check = {"stage": "decode", "metric": "largest difference", "value": 7.0, "limit": 1.0, "passed": False}
    checks = [check, check | {"value": 0.5, "passed": True}]
    text = table({"passed": False, "checks": checks, "precision": "fp16", "device": "cuda"})
    assert [line[:4] for line in text.splitlines()] == ["FAIL", "ok  ", "FAIL"]


# Weights


def test_a_decoder_weight(copy, system):
    weight = system.tokenizer.decoder.conv_out.weight

    def change(array):
        array[0, 0, 1, 1] += 0.3

    change_weight(copy, weight, change)
    assert failures(verify_package(copy, system)) == {"decode: largest difference in grey levels"}


def test_an_encoder_weight(copy, system):
    def change(array):
        array[:] *= 1.2

    change_weight(copy, system.tokenizer.encoder.conv_in.weight, change)
    failed(failures(verify_package(copy, system)), "encode: codes outside the margin rule")


@pytest.fixture(scope="module")
def used(pipeline):
    """Rows of the codebook from the most used down."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    return np.bincount(pipeline.encode(images).ravel(), minlength=64).argsort()[::-1]


def test_a_row_of_the_codebook(copy, system, used):
    def change(array):
        array[used[0]] += 0.5

    change_weight(copy, system.tokenizer.quantizer.codebook, change)
    failed(failures(verify_package(copy, system)), "decode: largest difference", "encode: codes outside")


def test_two_rows_of_the_codebook_swapped(copy, system, used):
    def change(array):
        array[used[:2]] = array[used[1::-1]]

    change_weight(copy, system.tokenizer.quantizer.codebook, change)
    failed(failures(verify_package(copy, system)), "decode: largest difference", "encode: codes outside")


def test_one_weight_of_the_prior(copy, system):
    def change(array):
        array[5, 7] += 0.05

    change_weight(copy, system.prior.classifier.linear.weight.T.contiguous(), change)
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference of logits")


# The step


def test_a_cache_that_is_written_at_the_wrong_place(copy, system):
    def change(node):
        if node.op_type != "TensorScatter":
            return None
        return helper.make_node("TensorScatter", [*node.input[:2], "shifted"], node.output, axis=-2, mode="linear")

    model = onnx.load(copy / "step.onnx", load_external_data=False)
    (function,) = [f for f in model.functions if f.name == "CachedAttention"]
    function.node.insert(0, helper.make_node("Sub", ["position", "position"], ["shifted"]))
    onnx.save(model, copy / "step.onnx")
    change_function(copy, "step", "CachedAttention", change)
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference")


@pytest.mark.parametrize("cache", ["key", "value"])
def test_a_cache_that_is_not_written(copy, system, cache):
    change_function(copy, "step", "CachedAttention", replace_with(f"present_{cache}", "Identity", f"past_{cache}"))
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference", "step: prefix: largest")


def test_one_layer_whose_cache_belongs_to_another(copy, system):
    data = json.loads((copy / FILE).read_text())
    aliases = data["stages"][2]["aliases"]
    aliases["present_key.0"], aliases["present_key.1"] = aliases["present_key.1"], aliases["present_key.0"]
    (copy / FILE).write_text(json.dumps(data))
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference")


def test_attention_to_later_positions_fails(copy, system):
    change_function(copy, "step", "CachedAttention", replace_with("seen", "Identity", "scores"))
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference", "step: prefix: largest")


def test_a_mask_that_is_one_place_off(copy, system):
    def change(node):
        if node.output[0] != "hidden":
            return None
        return helper.make_node("LessOrEqual", node.input, node.output)

    change_function(copy, "step", "CachedAttention", change)
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference")


# Sampling


def test_sampling_without_noise(copy, system):
    change_function(copy, "step", "GumbelSample", replace_with("perturbed", "Identity", "kept"))
    failed(failures(verify_package(copy, system)), "generate: full distribution: tokens outside")


def test_sampling_that_ignores_the_temperature(copy, system):
    change_function(copy, "step", "GumbelSample", replace_with("scaled", "Identity", "logits_fp32"))
    found = failures(verify_package(copy, system))
    failed(found, "generate: truncated: tokens outside")
    assert not any("full distribution" in name for name in found)


def test_sampling_that_ignores_top_k(copy, system):
    change_function(copy, "step", "GumbelSample", replace_with("survivors", "Identity", "scaled"))
    failed(failures(verify_package(copy, system)), "generate: truncated: tokens outside")


def test_sampling_that_ignores_top_p(copy, system):
    change_function(copy, "step", "GumbelSample", replace_with("threshold_p", "Identity", "k_low_3"))
    assert failures(verify_package(copy, system)) == {
        "generate: truncated: tokens outside the margin rule",
        "generate: image alone: tokens outside the margin rule",
    }


def test_noise_keyed_by_the_place_in_the_batch(plan, system, monkeypatch):
    change_noise(monkeypatch, by_place)
    failed(failures(verify(plan, system)), "generate: image alone")


def test_noise_that_is_the_same_at_each_step(plan, system, monkeypatch):
    change_noise(monkeypatch, lambda keys: [(seed, image, 0) for seed, image, _ in keys])
    failed(failures(verify(plan, system)), "generate: full distribution: tokens outside")


def test_noise_that_changes_from_run_to_run(plan, system, monkeypatch):
    runs = iter(range(10**6))
    change_noise(monkeypatch, lambda keys: [(next(runs), image, step) for _, image, step in keys])
    failed(failures(verify(plan, system)), "generate: codes that differ in a second run")


# The quantizer


def test_a_quantizer_that_takes_the_second_nearest(copy, system):
    model = onnx.load(copy / "encode.onnx", load_external_data=False)
    index = next(i for i, f in enumerate(model.functions) if f.name == "VQResidual")
    text = onnx.printer.to_text(model.functions[index])
    body = text[text.index("VQResidual") :].replace("ArgMax", "ArgMin")
    model.functions[index].CopyFrom(parse(body))
    onnx.save(model, copy / "encode.onnx")
    reseal(copy)
    failed(failures(verify_package(copy, system)), "encode: codes outside the margin rule")


def test_a_lookup_that_ignores_missing_codes(copy, system):
    """The code -1 would count as code 0."""
    change_function(copy, "decode", "VQLookup", replace_with("masked", "Identity", "rows"))
    assert failures(verify_package(copy, system)) == {"decode: largest difference in grey levels"}


# The checkpoint


def test_another_checkpoint_is_refused(plan, system):
    from copy import deepcopy

    other = deepcopy(system)
    other.prior.pos_emb_d.data[0, 0, 0] += 1e-3
    with pytest.raises(
        VqdeployError, match=r"made from another checkpoint; expected digest .*, found .*--checkpoint"
    ) as caught:
        verify(plan, other)
    assert caught.value.exit_code == 2


def test_without_a_checkpoint_only_what_is_shipped_is_compared(plan):
    with pytest.raises(VqdeployError, match="made from a checkpoint that is not shipped"):
        verify(plan)


def test_a_damaged_plan_is_refused_before_anything_runs(plan, system, tmp_path):
    (tmp_path / "a.plan").write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(VqdeployError, match="not a plan, or is damaged"):
        verify(tmp_path / "a.plan", system)
