"""The masked prior as a network: what sees what."""

import pytest
import torch

SYSTEMS = ["movq_system", "adaptive_system"]
SIZE, MASK, NO_LABEL = 32, 32, 3


@pytest.fixture(params=SYSTEMS)
def prior(request):
    return request.getfixturevalue(request.param).prior


@pytest.fixture
def codes(prior):
    return torch.randint(0, SIZE, (2, *prior.config.grid), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_code_sees_every_other_and_the_label(prior, codes):
    labels = torch.tensor([0, 2])
    logits = prior.logits(codes, labels)
    assert logits.shape == (*codes.shape, SIZE)

    def change(codes=codes, labels=labels):
        return (prior.logits(codes, labels) - logits).abs().amax((0, -1))

    assert change(labels=torch.tensor([1, NO_LABEL])).min() > 1e-3
    last = codes.clone()
    last[:, 3, 3, -1] = MASK
    assert change(last).min() > 1e-3
    moved = codes.flip(1)
    assert (prior.logits(moved, labels).flip(1) - logits).abs().amax() > 1e-2  # positions count


@torch.no_grad()
def test_channels_have_tables_of_their_own(movq_system):
    prior = movq_system.prior
    codes = torch.randint(0, SIZE, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    entries = prior.embed(codes, torch.tensor([1]))[0, 1:] - prior.pos_emb[0, 1:]
    tables = prior.tok_emb.weight.view(4, SIZE + 1, 16)
    for place, position in ((0, (0, 0)), (6, (1, 2)), (15, (3, 3))):
        expected = torch.cat([tables[channel, code] for channel, code in enumerate(codes[0][position])])
        torch.testing.assert_close(entries[place], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(prior, codes):
    labels = torch.tensor([0, 2])
    alone = torch.cat([prior.logits(codes[i : i + 1], labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(prior.logits(codes, labels), alone, rtol=0, atol=1e-5)
