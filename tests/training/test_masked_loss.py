"""What a masked prior learns."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.systems import SYSTEMS, Recipe
from vqdeploy.systems.losses import masked_loss
from vqdeploy.training.prior import PriorTraining

GRID, CELLS, SIZE, CLASSES = (4, 4, 4), 64, 8, 3


class Recorder:
    """A system whose codes are given, and whose prior notes what it is asked and gives the same logits always."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(0, SIZE, (count, *GRID), generator=generator)
        self.table = torch.randn(count, *GRID, SIZE, generator=generator).requires_grad_()
        self.config = SimpleNamespace(prior=MaskGITConfig(grid=GRID, codebook_size=SIZE, classes=CLASSES), model="movq")
        self.tokenizer = SimpleNamespace(encode=lambda x: self.codes)
        self.prior = SimpleNamespace(logits=self.logits)

    def logits(self, codes, labels):
        self.seen, self.labels = codes, labels
        return self.table

    def loss(self, training=True, **options):
        torch.manual_seed(0)
        labels = torch.arange(len(self.codes)) % CLASSES
        return masked_loss(self, torch.empty(0), labels, Recipe(**options), training), labels


def test_the_loss_looks_at_masked_codes_alone():
    system = Recorder(20)
    loss, _ = system.loss(label_smoothing=0.2)
    masked = system.seen == SIZE
    assert torch.equal(system.seen[~masked], system.codes[~masked])
    likelihoods = system.table.detach().log_softmax(-1)[masked]
    right = likelihoods.gather(1, system.codes[masked][:, None])[:, 0]
    torch.testing.assert_close(loss.detach(), -(0.8 * right + 0.2 * likelihoods.mean(1)).mean())
    (gradient,) = torch.autograd.grad(loss, system.table)
    assert torch.equal(gradient.abs().sum(-1) > 0, masked)


def test_shares_follow_the_cosine_and_cells_are_masked_alike():
    system = Recorder(3000)
    system.loss()
    masked = (system.seen == SIZE).view(3000, CELLS).double()
    counts = masked.sum(1)
    assert counts.min() >= 1
    # u uniform in 0..1: half the images mask more than cos(pi / 4), a tenth less than cos(pi / 2 * .9) of the codes
    for quantile in (0.1, 0.5, 0.9):
        share = np.cos(np.pi / 2 * quantile)
        assert (counts > share * CELLS).double().mean() == pytest.approx(quantile, abs=0.03)
    assert (masked.mean(0) - 2 / np.pi).abs().max() < 0.04
    partly = masked.view(3000, 16, 4).mean(2)
    assert ((partly > 0) & (partly < 1)).double().mean() > 0.2  # each channel is masked by itself


def test_labels_are_dropped_in_training_only():
    system = Recorder(3000)
    _, labels = system.loss(training=False, label_dropout=0.25)
    assert torch.equal(system.labels, labels)
    system.loss(training=True, label_dropout=0.25)
    dropped = system.labels != labels
    assert (system.labels[dropped] == CLASSES).all()
    assert dropped.double().mean() == pytest.approx(0.25, abs=0.03)
    system.loss(training=True, label_dropout=0.0)
    assert torch.equal(system.labels, labels)


def test_held_out_images_keep_their_labels(movq_system, monkeypatch):
    asked = []
    watched = replace(SYSTEMS["movq"], loss=lambda system, x, labels, recipe, training: asked.append(training))
    monkeypatch.setitem(SYSTEMS, "movq", watched)
    module = PriorTraining(movq_system, Recipe(), None)
    try:
        for validating in (True, False):
            module._trainer = SimpleNamespace(validating=validating)
            module._loss(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    finally:
        movq_system.eval().requires_grad_(True)
    assert asked == [False, True]


def test_the_loss_of_a_whole_system_falls(movq_system):
    """Ten steps on one batch: gradients reach every weight."""
    import copy

    system = copy.deepcopy(movq_system)
    x, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.Adam(system.prior.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)
        loss = masked_loss(system, x, labels, Recipe(label_dropout=0.5), training=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(weight.grad.abs().sum() > 0 for weight in system.prior.parameters())
    assert not any(weight.grad is not None for weight in system.tokenizer.parameters())
