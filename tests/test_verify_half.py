"""Plans in fp16: good ones pass, and whatever is broken in one is found for all that rounding may do."""

import shutil

import numpy as np
import pytest
import torch
from onnx import helper
from support.mutations import change_function, change_weight, failed, failures, replace_with

from vqdeploy.engines.build import build
from vqdeploy.runtime import load
from vqdeploy.verify import _largest_number, verify, verify_package
from vqdeploy.verify.checks import at_most, judge

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(half_package, tmp_path):
    return shutil.copytree(half_package, tmp_path / "package")


@pytest.fixture
def masked_copy(movq_half_package, tmp_path):
    return shutil.copytree(movq_half_package, tmp_path / "package")


@pytest.fixture
def snail_copy(vqvae2_half_package, tmp_path):
    return shutil.copytree(vqvae2_half_package, tmp_path / "package")


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "own"])
@pytest.mark.parametrize("name", ["", "text_", "movq_", "vit_", "vqgan_", "llamagen_", "vqvae2_"])
def test_a_good_plan_passes(request, tmp_path, name, portable):
    package, system = (request.getfixturevalue(f"{name}{what}") for what in ("half_package", "system"))
    build(package, tmp_path / "half.plan", portable=portable)
    report = verify(tmp_path / "half.plan", system)
    assert failures(report) == set()
    assert any(check["metric"].startswith("PSNR") for check in report["checks"])


def test_a_generation_repeats_and_images_stand_alone(half_package, tmp_path):
    build(half_package, tmp_path / "half.plan")
    pipeline = load(tmp_path / "half.plan", threads=1)
    first = pipeline.generate([0, 1, 2], seed=3)
    np.testing.assert_array_equal(pipeline.generate([0, 1, 2], seed=3).codes, first.codes)
    assert first.images.dtype == np.uint8
    assert pipeline.encode(first.images).dtype == np.int64


def test_what_a_gpu_could_not_hold_is_found(half_package, system, tmp_path, monkeypatch):
    """A CPU computes in fp32 here and there, and does not overflow."""
    build(half_package, tmp_path / "half.plan")
    conv = system.tokenizer.encoder.conv_in
    hook = conv.register_forward_hook(lambda layer, inputs, output: output * 1e5)
    try:
        report = verify(tmp_path / "half.plan", system)
    finally:
        hook.remove()
    failed(failures(report), "reference: largest number that leaves a layer")


@pytest.mark.parametrize("values", [[np.nan, 1.0], [1.0, np.nan], [np.nan, np.inf], [np.inf, np.nan]])
def test_a_layer_that_gives_nan_is_found_whenever_it_runs(values):
    layer = torch.nn.Identity()
    with _largest_number([layer]) as largest:
        for value in values:
            layer(torch.tensor([0.5, value, -2.0]))
    assert not at_most("reference", "largest number", float(largest), 65504.0).passed


# What is broken


def test_a_decoder_weight(copy, system):
    def change(array):
        array[0, 0, 1, 1] += 0.3

    change_weight(copy, system.tokenizer.decoder.conv_out.weight.half(), change)
    failed(failures(verify_package(copy, system)), "decode: PSNR")


def test_an_encoder_weight(copy, system):
    def change(array):
        array[:] *= 1.2

    change_weight(copy, system.tokenizer.encoder.conv_in.weight.half(), change)
    failed(failures(verify_package(copy, system)), "encode: codes outside the margin rule")


def test_a_row_of_the_codebook(copy, system):
    def change(array):
        array[:8] += 0.5

    change_weight(copy, system.tokenizer.quantizer.codebook, change)
    failed(failures(verify_package(copy, system)), "decode: PSNR", "encode: codes outside")


def test_one_weight_of_the_prior(copy, system):
    def change(array):
        array[5, 7] += 0.2

    change_weight(copy, system.prior.classifier.linear.weight.T.contiguous().half(), change)
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference of logits")


def test_a_mask_that_is_one_place_off(copy, system):
    def change(node):
        return helper.make_node("LessOrEqual", node.input, node.output) if node.output[0] == "hidden" else None

    change_function(copy, "step", "CachedAttention", change)
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference")


@pytest.mark.parametrize("cache", ["key", "value"])
def test_a_stale_cache(copy, system, cache):
    change_function(copy, "step", "CachedAttention", replace_with(f"present_{cache}", "Identity", f"past_{cache}"))
    failed(failures(verify_package(copy, system)), "step: cached step: largest difference", "step: prefix: largest")


@pytest.mark.parametrize(
    ("output", "source"),
    [("perturbed", "kept"), ("scaled", "logits_fp32"), ("survivors", "scaled"), ("threshold_p", "k_low_3")],
    ids=["noise", "temperature", "top_k", "top_p"],
)
def test_sampling_that_ignores_an_option(copy, system, output, source):
    change_function(copy, "step", "GumbelSample", replace_with(output, "Identity", source))
    failed(failures(verify_package(copy, system)), "generate: truncated: tokens outside")


def test_a_lookup_that_ignores_missing_codes(copy, system):
    change_function(copy, "decode", "VQLookup", replace_with("masked", "Identity", "rows"))
    broken = failures(verify_package(copy, system))
    assert broken == {
        "decode: largest difference in grey levels",
        "decode: PSNR of the worst image in dB, at least the limit",
    }


def test_a_head_of_a_masked_prior_that_is_off(masked_copy, movq_system):
    change_weight(masked_copy, movq_system.prior.head.weight.T.half(), lambda w: np.multiply(w, 1.02, out=w))
    failed(failures(verify_package(masked_copy, movq_system)), "step: one label: largest", "step: guidance: largest")


def test_a_row_that_is_not_written(snail_copy, vqvae2_system):
    change_function(snail_copy, "bottom_pixel", "WriteCache", replace_with("present", "Identity", "past"))
    failed(failures(verify_package(snail_copy, vqvae2_system)), "step: bottom: largest")


# The rules


def test_rounding_may_move_the_mass_of_a_nucleus():
    """A flat distribution: logits that are off by a little move the sum of many probabilities past p."""
    logits = torch.zeros(1, 100)
    logits[0, :50] = 1e-3
    options = {"temperature": 1.0, "top_k": 0, "top_p": float(logits.softmax(1)[0, :50].sum()) - 1e-4}
    noise = torch.zeros(1, 100)
    noise[0, 99] = 10.0  # draws the last code wherever truncation leaves it in
    far, _ = judge(logits, noise, torch.tensor([99]), options, tolerance=1e-3)
    assert not far
    far, _ = judge(logits, noise, torch.tensor([99]), options, tolerance=1e-5)
    assert far
