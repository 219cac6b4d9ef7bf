"""What the prior of several levels learns."""

import copy

import torch
import torch.nn.functional as F

from vqdeploy.systems import Recipe
from vqdeploy.systems.losses import level_loss


def test_levels_count_alike_whatever_their_size(vqvae2_system):
    x, labels = torch.rand(3, 3, 24, 24) * 2 - 1, torch.tensor([0, 1, 2])
    with torch.no_grad():
        codes = vqvae2_system.tokenizer.encode(x)
        logits = vqvae2_system.prior.logits(codes, labels)
        expected = sum(
            F.cross_entropy(logits[:, part].flatten(0, 1), codes[:, part].flatten())
            for part in (slice(0, 9), slice(9, 45))
        )
        torch.testing.assert_close(level_loss(vqvae2_system, x, labels, Recipe(), training=True), expected)


def test_the_loss_of_a_whole_system_falls(vqvae2_system):
    """Ten steps on one batch: gradients reach every weight."""
    system = copy.deepcopy(vqvae2_system)
    x, labels = torch.rand(4, 3, 24, 24) * 2 - 1, torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.Adam(system.prior.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = level_loss(system, x, labels, Recipe(), training=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(weight.grad.abs().sum() > 0 for weight in system.prior.parameters())
    assert not any(weight.grad is not None for weight in system.tokenizer.parameters())
