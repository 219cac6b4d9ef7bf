"""Plans of VAR: good ones pass, and whatever is broken in one is found, by the check that names it."""

import shutil

import numpy as np
import pytest
import torch
from support.mutations import by_place, change_function, change_noise, change_weight, failed, failures, replace_with

from vqdeploy.engines.build import build
from vqdeploy.export.var import Step
from vqdeploy.runtime import next_scale
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.runtime.next_scale import NextScaleSampler
from vqdeploy.verify import verify, verify_package

pytestmark = pytest.mark.slow

ONE, GUIDED = "step: one label: largest", "step: guidance: largest"


@pytest.fixture
def copy(var_package, tmp_path):
    return shutil.copytree(var_package, tmp_path / "package")


@pytest.fixture(scope="module")
def step(var_system):
    """The stage as it is exported, for its tables."""
    with torch.no_grad():
        return Step(var_system.prior)


def scale(array):
    array *= 1.1


@pytest.mark.parametrize("kind", ["var_plan", "var_portable_plan"])
def test_a_good_plan_passes(request, kind, var_system):
    names = []
    report = verify(request.getfixturevalue(kind), var_system, names.append)
    assert failures(report) == set()
    assert names == ["encode and decode", "step", "generation"]
    stages = {"reference", "encode", "decode", "reconstruct", "step", "blend", "generate"}
    assert {check["stage"] for check in report["checks"]} == stages


def test_shared_modulation_passes(shared_package, shared_system):
    assert failures(verify_package(shared_package, shared_system)) == set()


def test_a_plan_that_splits_requests_passes(var_package, var_system, tmp_path):
    build(var_package, tmp_path / "a.plan", batch=SizeRange(1, 1, 1))
    assert failures(verify(tmp_path / "a.plan", var_system)) == set()


# Broken graphs


def test_a_codebook_that_moved(copy, var_system):
    change_weight(copy, var_system.tokenizer.quantizer.codebook, lambda w: np.negative(w[:8], out=w[:8]))
    failed(failures(verify_package(copy, var_system)), "encode: codes outside", "decode: largest", ONE, "blend: ")


def test_a_head_that_is_off(copy, var_system):
    change_weight(copy, var_system.prior.head.weight.T, scale)
    failed(failures(verify_package(copy, var_system)), ONE, GUIDED)


def test_a_modulation_that_is_off(copy, var_system, step):
    change_weight(copy, step.blocks[1].modulations, scale)
    failed(failures(verify_package(copy, var_system)), ONE, GUIDED)


@pytest.mark.parametrize("matrix", ["down", "up"])
def test_another_resizing(copy, var_system, matrix):
    change_weight(copy, getattr(var_system.tokenizer.quantizer, matrix), scale)
    failed(failures(verify_package(copy, var_system)), ONE)


def test_the_convolution_of_another_scale(copy, var_system):
    change_weight(copy, var_system.tokenizer.quantizer.mixing, lambda w: np.copyto(w, np.roll(w, 1, 1)))
    failed(failures(verify_package(copy, var_system)), ONE, "blend: ")


def test_positions_that_moved(copy, var_system, step):
    change_weight(copy, step.positions, lambda w: np.copyto(w[5:14], w[14:23]))
    failed(failures(verify_package(copy, var_system)), ONE)


def test_a_draw_without_noise(copy, var_system):
    change_function(copy, "step", "GumbelSample", replace_with("perturbed", "Identity", "kept"))
    failed(failures(verify_package(copy, var_system)), "generate: full distribution, guided: tokens")


def test_a_temperature_left_out(copy, var_system):
    change_function(copy, "step", "GumbelSample", replace_with("scaled", "Identity", "logits_fp32"))
    found = failures(verify_package(copy, var_system))
    failed(found, "generate: truncated: tokens")
    assert not any("full distribution" in name for name in found)


def test_blended_maps_without_truncation(copy, var_system):
    change_function(copy, "blend", "TruncatedLogits", replace_with("kept", "Identity", "scaled"))
    assert {name.partition(":")[0] for name in failures(verify_package(copy, var_system))} == {"blend"}


# A broken loop


def test_guidance_that_does_not_rise(var_plan, var_system, monkeypatch):
    monkeypatch.setattr(NextScaleSampler, "_share", property(lambda self: 1.0))
    found = failures(verify(var_plan, var_system))
    failed(found, GUIDED, "generate: full distribution, guided: tokens")
    assert ONE not in found


def test_a_share_that_blending_does_not_get(var_plan, var_system, monkeypatch):
    smoothen = NextScaleSampler._smoothen
    monkeypatch.setattr(
        NextScaleSampler, "_smoothen", lambda self, slots, step, share: smoothen(self, slots, step, 0.0)
    )
    assert {name.partition(":")[0] for name in failures(verify(var_plan, var_system))} == {"blend"}


def test_blended_maps_that_no_scale_sees(var_plan, var_system, monkeypatch):
    monkeypatch.setattr(NextScaleSampler, "_smoothen", lambda self, slots, step, share: None)
    failed(failures(verify(var_plan, var_system)), "blend: largest")


def test_caches_that_stay_behind(var_plan, var_system, monkeypatch):
    monkeypatch.setattr(next_scale, "carried", lambda binding: {"past_map": binding.outputs["present_map"]})
    failed(failures(verify(var_plan, var_system)), ONE, GUIDED)


def test_noise_by_the_place_in_the_batch(var_plan, var_system, monkeypatch):
    change_noise(monkeypatch, by_place)
    failed(failures(verify(var_plan, var_system)), "generate: image alone")
