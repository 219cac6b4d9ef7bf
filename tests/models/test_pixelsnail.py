"""The networks of the levels: what sees what, tables against convolutions, folded weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdeploy.convert.vq_vae_2 import fold, prior_weights
from vqdeploy.models.ops import sample
from vqdeploy.models.pixelsnail import (
    CausalConv,
    CodeConv,
    PixelSNAIL,
    PixelSNAILConfig,
    VQVAE2Prior,
    VQVAE2PriorConfig,
    causal_offsets,
)

SIZE, CLASSES = 12, 3
TOP = PixelSNAILConfig((2, 3), 8, 5, 2, 2, 12, True, 2, 1, 6, 3, 1)
BOTTOM = replace(TOP, grid=(4, 6), kernel=3, attention=False, out_res_blocks=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["two levels", "three levels", "attention at the bottom"])
def prior(request):
    """In double precision, so that what does not count is told from what counts a little."""
    levels = {
        "two levels": (TOP, BOTTOM),
        "three levels": (replace(TOP, grid=(1, 2)), replace(BOTTOM, grid=(2, 4)), replace(TOP, grid=(4, 8))),
        "attention at the bottom": (replace(TOP, kernel=3), replace(TOP, grid=(4, 6))),
    }[request.param]
    return VQVAE2Prior(VQVAE2PriorConfig(levels, SIZE, CLASSES)).double().eval()


@torch.no_grad()
def test_no_code_sees_itself_or_a_later_one(prior):
    count = prior.config.positions
    codes, labels = torch.randint(0, SIZE, (1, count)), torch.tensor([1])
    changed = codes.repeat(count, 1)
    changed[range(count), range(count)] = (codes[0] + 1) % SIZE
    change = prior.logits(changed, labels.repeat(count)) - prior.logits(codes, labels)
    seen = change.abs().amax(-1) > 1e-9  # [changed code, logits]
    assert not seen.tril().any()
    above, first = slice(0), 0
    for height, width in prior.config.level_grids:
        own = slice(first, first + height * width)
        for place in range(first, own.stop):
            if (place - first + 1) % width:
                assert seen[place, place + 1]
            if place + width < own.stop:
                assert seen[place, place + width]
        assert seen[above, own].any(1).all()
        above, first = own, own.stop


@torch.no_grad()
def test_the_first_rows_alone_give_their_logits(prior):
    network = prior.levels[0]
    height, width = network.config.grid
    codes = torch.randint(0, SIZE, (2, height, width))
    condition = network.embed_condition(torch.tensor([0, 2]))
    rows = network(codes[:, :1], condition)
    torch.testing.assert_close(rows, network(codes, condition)[:, :1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_label_counts_at_every_level(prior):
    codes = torch.randint(0, SIZE, (1, prior.config.positions))
    change = prior.logits(codes, torch.tensor([0])) - prior.logits(codes, torch.tensor([2]))
    assert change.abs().amax((0, 2)).min() > 1e-6


@torch.no_grad()
def test_one_class_is_none():
    prior = VQVAE2Prior(VQVAE2PriorConfig((TOP, BOTTOM), SIZE, classes=1)).eval()
    assert not any("label" in name or ".condition" in name for name, _ in prior.levels[0].named_parameters())
    assert not any("label" in name for name, _ in prior.named_parameters())
    codes = torch.randint(0, SIZE, (2, prior.config.positions))
    assert prior.logits(codes, torch.zeros(2, dtype=torch.int64)).shape == (2, 30, SIZE)


@pytest.mark.parametrize("greedy", [True, False])
def test_samples_are_those_of_the_full_pass(prior, greedy):
    count, labels = prior.config.positions, torch.tensor([2, 0])
    noise = torch.zeros(count, 2, 1, SIZE) if greedy else -torch.empty(count, 2, 1, SIZE).exponential_().log()
    options = torch.tensor([0.8, 1.3]), torch.tensor([8, SIZE]), torch.tensor([1.0, 0.9])
    codes = prior.generate(labels, noise.__getitem__, *(option[:, None] for option in options))
    assert codes.shape == (2, count)
    with torch.no_grad():
        logits = prior.logits(codes, labels)
    for position in range(count):
        assert torch.equal(sample(logits[:, position], noise[position][:, 0], *options), codes[:, position])


def test_levels_double():
    with pytest.raises(ValueError, match=r"a level of \(4, 6\) cannot follow one of \(2, 2\)"):
        VQVAE2Prior(VQVAE2PriorConfig((replace(TOP, grid=(2, 2)), BOTTOM), SIZE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": 4}, "odd size"),
        ({"kernel": 1}, "odd size"),
        ({"heads": 3}, "cannot be split into 3 heads"),
        ({"condition_kernel": 2}, "odd size"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PixelSNAIL(replace(TOP, **change), SIZE, finer=True)


# Layers


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_causal_convolution_is_one_with_a_masked_kernel(kernel):
    layer, x = CausalConv(3, 4, kernel), torch.randn(2, 3, 5, 6)
    last_row = F.pad(layer.left.weight, (0, kernel - kernel // 2))
    weight = torch.cat([layer.above.weight, last_row], 2)
    expected = F.conv2d(F.pad(x, (kernel // 2, kernel // 2, kernel - 1, 0)), weight, layer.above.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel", [3, 5])
def test_gradients_of_a_causal_convolution_reach_earlier_places_alone(kernel):
    layer, x = CausalConv(2, 3, kernel), torch.randn(1, 2, 6, 7, requires_grad=True)
    for row, column in ((0, 0), (0, 3), (3, 0), (4, 3), (5, 6)):
        (gradient,) = torch.autograd.grad(layer(x)[0, :, row, column].sum(), x)
        reached = {(r - row, c - column) for r, c in gradient[0].abs().sum(0).nonzero().tolist()}
        window = causal_offsets(kernel - 1, kernel // 2)
        assert reached == {(r, c) for r, c in window if row + r >= 0 and 0 <= column + c < 7}


def test_tables_are_convolutions_over_one_hot_codes():
    offsets = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    layer, codes = CodeConv(SIZE, 4, offsets), torch.randint(0, SIZE, (2, 5, 3))
    weight = layer.weight.view(3, 3, SIZE, 4).permute(3, 2, 0, 1)
    one_hot = F.one_hot(codes, SIZE).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(layer(codes), F.conv2d(one_hot, weight, padding=1))
    (gradient,) = torch.autograd.grad(layer(codes).square().sum(), layer.weight)
    (expected,) = torch.autograd.grad(F.conv2d(one_hot, weight, padding=1).square().sum(), layer.weight)
    torch.testing.assert_close(gradient, expected)


# Public weights


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (1, 6), (5, 1)])
def test_the_first_layer_is_two_shifted_convolutions(kernel, shape):
    """The public network's two, of weights as they are imported."""
    half, (height, width) = kernel // 2, shape
    horizontal, vertical = nn.Conv2d(SIZE, 8, (half, kernel)), nn.Conv2d(SIZE, 8, (half + 1, half))
    public = {f"{name}.{key}": weight for name, conv in (("horizontal", horizontal), ("vertical", vertical))
              for key, weight in conv.state_dict().items()}  # fmt: skip
    layer = PixelSNAIL(replace(TOP, kernel=kernel), SIZE).entry
    ours = prior_weights({"background": torch.zeros(0)} | public)
    layer.load_state_dict({key.removeprefix("entry."): weight for key, weight in ours.items()})
    codes = torch.randint(0, SIZE, (2, height, width))
    one_hot = F.one_hot(codes, SIZE).permute(0, 3, 1, 2).float()
    down = F.pad(horizontal(F.pad(one_hot, (half, half, half - 1, 0))), (0, 0, 1, -1))
    right = F.pad(vertical(F.pad(one_hot, (half - 1, 0, half, 0))), (1, -1))
    torch.testing.assert_close(layer(codes), down + right)


def public_state(out_res_blocks):
    """Weights in the public names, random in forbidden taps too, of a network without a condition."""

    def normalized(name, *shape, bias=True):
        direction = {
            f"{name}.weight_v": torch.randn(shape),
            f"{name}.weight_g": torch.rand(shape[0], *[1] * (len(shape) - 1)),
        }
        return direction | ({f"{name}.bias": torch.randn(shape[0])} if bias else {})

    state = {"background": torch.zeros(1, 2, 2, 3)}
    state |= normalized("horizontal.conv.conv", 8, SIZE, 2, 5) | normalized("vertical.conv.conv", 8, SIZE, 3, 2)
    for block in range(2):
        for resblock in range(2):
            name = f"blocks.{block}.resblocks.{resblock}"
            state |= normalized(f"{name}.conv1.conv.conv", 12, 8, 5, 5)
            state |= normalized(f"{name}.conv2.conv.conv", 16, 12, 5, 5)
        state |= normalized(f"blocks.{block}.out.conv", 8, 10, 1, 1)
    for resblock in range(out_res_blocks):
        state |= normalized(f"out.{resblock}.conv1.conv", 12, 8, 1, 1)
        state |= normalized(f"out.{resblock}.conv2.conv", 16, 12, 1, 1)
    return state | normalized(f"out.{out_res_blocks + 1}.conv", SIZE, 8, 1, 1)


@pytest.mark.parametrize("out_res_blocks", [0, 2])
@torch.no_grad()
def test_every_public_name_is_taken(out_res_blocks):
    network = PixelSNAIL(replace(TOP, attention=False, out_res_blocks=out_res_blocks), SIZE)
    state = public_state(out_res_blocks)
    network.load_state_dict(prior_weights(state))
    parallel = {f"module.{key}": weight for key, weight in state.items()}
    assert all(torch.equal(weight, prior_weights(state)[key]) for key, weight in prior_weights(parallel).items())


def test_forbidden_taps_leave_before_the_norm_is_taken():
    dirty, clean = public_state(0), public_state(0)
    for key in clean:
        clean[key] = dirty[key].clone()
        if "resblocks" in key and key.endswith("weight_v"):
            clean[key][:, :, -1, 2:] = 0
    folded = fold(dirty)
    for key, weight in fold(clean).items():
        assert torch.equal(folded[key], weight), key
    name = "blocks.1.resblocks.0.conv2"
    scale, direction = (clean[f"{name}.conv.conv.weight_{part}"] for part in "gv")
    torch.testing.assert_close(folded[f"{name}.weight"], torch._weight_norm(direction, scale))


def test_names_of_parametrizations_are_taken():
    old = public_state(1)
    new = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): weight
        for key, weight in old.items()
    }
    folded = fold(new)
    assert folded.keys() == fold(old).keys()
    assert all(torch.equal(folded[key], weight) for key, weight in fold(old).items())
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    folded = fold({f"causal_attention.query.{key}": weight for key, weight in layer.state_dict().items()})
    torch.testing.assert_close(folded["causal_attention.query.weight"], layer.weight.detach())
