"""Plans of LlamaGen's priors: good ones pass, and whatever is broken in one is found, by the check that names it."""

import shutil
from dataclasses import replace

import pytest
import torch
from support.mutations import change_weight, failed, failures
from support.systems import SMALL_LLAMAGEN, lively

from vqdeploy.export.llamagen import LabelStep, TextStep
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.verify import verify, verify_package

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(llamagen_package, tmp_path):
    return shutil.copytree(llamagen_package, tmp_path / "package")


@pytest.fixture
def texts(features_package, tmp_path):
    return shutil.copytree(features_package, tmp_path / "package")


def test_good_plans_pass(llamagen_plan, llamagen_system, features_plan, features_system):
    assert failures(verify(llamagen_plan, llamagen_system)) == set()
    assert failures(verify(features_plan, features_system)) == set()


def test_heads_of_100_pass(artifacts):
    """The width of those of GPT-3B."""
    prior = replace(SMALL_LLAMAGEN.prior, width=200, heads=2, layers=1)
    system = lively(replace(SMALL_LLAMAGEN, prior=prior))
    assert failures(verify(artifacts.plan(system), system)) == set()


def test_a_class_embedding(copy, llamagen_system):
    labels = llamagen_system.prior.cls_embedding.embedding_table.weight
    change_weight(copy, labels, lambda rows: rows[:3, ::2].__iadd__(0.1))
    failed(failures(verify_package(copy, llamagen_system)), "step: cached step: largest", "generate: full distribution")


def test_the_embedding_of_no_label(copy, llamagen_system):
    """Only guidance sees it."""
    labels = llamagen_system.prior.cls_embedding.embedding_table.weight
    change_weight(copy, labels, lambda rows: rows[3, ::2].__iadd__(0.5))
    found = failures(verify_package(copy, llamagen_system))
    failed(found, "step: guidance: largest", "generate: full distribution: tokens outside")
    assert not any(name.startswith(("step: cached", "step: prefix", "step: drawn")) for name in found)


def test_a_condition_that_is_not_rotated_to_zero(copy, llamagen_system):
    """The identity, which one would expect."""
    step = LabelStep(llamagen_system.prior)
    change_weight(copy, step.cosine, lambda rows: rows[0].__iadd__(1))
    failed(failures(verify_package(copy, llamagen_system)), "step: cached step: largest", "step: prefix: largest")


def test_the_rotation_of_the_last_row(copy, llamagen_system):
    step = LabelStep(llamagen_system.prior)
    change_weight(copy, step.sine, lambda rows: rows[13:].__imul__(0.5))
    failed(failures(verify_package(copy, llamagen_system)), "step: cached step: largest")


def test_a_norm_that_is_forgotten(copy, llamagen_system):
    prior = llamagen_system.prior
    folded = (prior.output.weight * prior.norm.weight).T
    change_weight(copy, folded, lambda rows: rows.__setitem__(..., prior.output.weight.T.numpy(force=True)))
    failed(failures(verify_package(copy, llamagen_system)), "step: cached step: largest")


def test_gate_and_value_that_are_swapped(copy, llamagen_system):
    block = llamagen_system.prior.layers[0]
    mlp, scale = block.feed_forward, block.ffn_norm.weight
    folded, swapped = ((torch.cat([a.weight, b.weight]) * scale).T for a, b in ((mlp.w1, mlp.w3), (mlp.w3, mlp.w1)))
    change_weight(copy, folded, lambda rows: rows.__setitem__(..., swapped.numpy(force=True)))
    failed(failures(verify_package(copy, llamagen_system)), "step: cached step: largest")


def test_the_null_text(texts, features_system):
    """Only guidance sees it, and of a short text its last rows."""
    none = features_system.prior.cls_embedding.uncond_embedding
    change_weight(texts, none, lambda rows: rows[-1].__iadd__(3.0))
    found = failures(verify_package(texts, features_system))
    failed(found, "step: guidance: largest", "generate: full distribution: tokens outside")
    assert not any(name.startswith(("step: cached", "step: prefix", "step: drawn")) for name in found)


def test_the_projection_of_texts(texts, features_system):
    step = TextStep(features_system.prior)
    change_weight(texts, step.texts.first.weight, lambda rows: rows[:, ::2].__imul__(1.2))
    failed(failures(verify_package(texts, features_system)), "step: cached step: largest", "step: prefix: largest")


def test_texts_of_a_wrong_length(features_plan, features_system, monkeypatch):
    """As if padding were attended."""
    monkeypatch.setattr("vqdeploy.runtime.condition.Condition.entries", lambda self, condition: self.length)
    failed(failures(verify(features_plan, features_system)), "step: cached step: largest")


@pytest.mark.parametrize("off", [-1, 1])
def test_an_interval_that_ends_elsewhere(llamagen_plan, llamagen_system, monkeypatch, off):
    guides = AutoregressiveSampler._guides_at
    monkeypatch.setattr(AutoregressiveSampler, "_guides_at", lambda s, item, place: guides(s, item, place - off))
    found = failures(verify(llamagen_plan, llamagen_system))
    failed(found, "generate: guidance at first: tokens outside")
