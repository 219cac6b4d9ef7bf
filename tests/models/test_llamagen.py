"""The prior of LlamaGen against recorded outputs of the public code, and against its own parts."""

import pytest
import torch
from support.golden import assert_close, read_golden

from vqdeploy.models.llamagen import LlamaGen, LlamaGenConfig, given, rotate, rotations
from vqdeploy.models.ops import truncate


def of_public(public: dict) -> LlamaGenConfig:
    hidden = public["multiple_of"] * -(-int(8 * public["dim"] / 3) // public["multiple_of"])
    side, text = round(public["block_size"] ** 0.5), public["model_type"] == "t2i"
    return LlamaGenConfig(
        grid=(side, side, 1),
        codebook_size=public["vocab_size"],
        width=public["dim"],
        layers=public["n_layer"],
        heads=public["n_head"],
        mlp_width=hidden,
        classes=1 if text else public["num_classes"],
        condition_length=public["cls_token_num"],
        text_width=public["caption_dim"] if text else 0,
    )


def read(name: str):
    config, tensors, state = read_golden(name)
    model = LlamaGen(of_public(config)).eval()
    model.load_state_dict(state)
    return model, tensors


@pytest.fixture(scope="module", params=["llamagen_gpt", "llamagen_gpt_text"])
def golden(request):
    model, tensors = read(request.param)
    return model, tensors, tensors.get("in/class", tensors.get("in/caption"))


def greedy(model: LlamaGen, conditions: torch.Tensor, *guidance: float) -> torch.Tensor:
    batch, size = len(conditions), model.config.codebook_size
    noise = torch.zeros(model.config.positions, batch, 1, size)
    options = torch.ones(batch, 1), torch.ones(batch, 1, dtype=torch.int64), torch.ones(batch, 1)
    return model.generate(conditions, noise.__getitem__, *options, *guidance).flatten(1)


@torch.no_grad()
def test_logits(golden):
    model, tensors, conditions = golden
    codes = tensors["in/codes"].view(2, *model.config.grid)
    assert_close(model.logits(codes, conditions).flatten(1, 3), tensors["out/logits"])
    none = model.unconditional(conditions)
    assert_close(model.logits(codes, none).flatten(1, 3), tensors["out/logits_unconditional"])


def test_greedy_codes(golden):
    model, tensors, conditions = golden
    scale = tensors["in/cfg_scale"].item()
    assert torch.equal(greedy(model, conditions), tensors["out/greedy_codes"])
    assert torch.equal(greedy(model, conditions, scale), tensors["out/greedy_codes_cfg"])


def test_greedy_codes_with_an_interval():
    model, tensors = read("llamagen_gpt")
    guidance = tensors["in/cfg_scale"].item(), tensors["in/cfg_interval"].item()
    assert torch.equal(greedy(model, tensors["in/class"], *guidance), tensors["out/greedy_codes_cfg_interval"])


def test_kept_codes():
    tensors = read_golden("llamagen_gpt")[1]
    logits, top_p = tensors["in/filter_logits"], tensors["in/filter_top_p"].expand(4)
    for top_k, name in ((tensors["in/filter_top_k"], "kept"), (torch.tensor([logits.shape[1]]), "kept_top_p_only")):
        kept = truncate(logits, torch.ones(4), top_k.expand(4), top_p) > -1e29
        assert torch.equal(kept, tensors[f"out/filter_{name}"].bool())


def test_only_differences_of_rows_and_columns_count():
    table = rotations(LlamaGenConfig(grid=(3, 4, 1), width=32, heads=2))
    assert table.shape == (13, 8, 2)
    assert not table[0].any()
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = [(rotate(query, table[i : i + 1]) * rotate(key, table[j : j + 1])).sum() for i, j in ((2, 8), (5, 11))]
    torch.testing.assert_close(*turned)  # one row down and two columns on, in two places


def test_texts_are_padded_by_zeros():
    model, tensors = read("llamagen_gpt_text")
    caption, mask = tensors["in/caption"], tensors["in/caption_mask"].bool()
    assert torch.equal(given(caption), mask)
    assert torch.equal(given(model.unconditional(caption)), mask)
