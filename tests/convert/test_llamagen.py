"""Files of LlamaGen's priors, as each way of training leaves them, and what is wrong with some."""

import argparse
import re

import pytest
import torch
from support.golden import read_golden
from support.public import save, write_config, write_system, write_tokenizer

from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.errors import ArtifactError, VqdeployError

WAYS = {
    "DDP": lambda s: {
        "model": s,
        "optimizer": {"state": {}},
        "steps": 7,
        "args": argparse.Namespace(gpt_model="GPT-B"),
    },
    "DeepSpeed": lambda s: {"module": s, "ds_config": {"zero": 1}, "global_steps": 7},
    "a state_dict": lambda s: {"state_dict": {f"module.{key}": weight for key, weight in s.items()}},
    "FSDP": lambda s: s,
    "FSDP within": lambda s: {
        re.sub(r"^layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key): weight
        for key, weight in s.items()
    },
}


@pytest.fixture
def files(tmp_path):
    """The tokenizer and its configuration, a configuration of the prior, and the weights of the prior."""
    _, tokenizer, _, size, _, _, _, config = write_system("llamagen_gpt", tmp_path)
    return {"tokenizer": tokenizer, "tokenizer_config": size, "prior_config": config}, read_golden("llamagen_gpt")[2]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_save_a_prior(files, tmp_path, way):
    known, state = files
    file = save(state | {"freqs_cis": torch.zeros(65, 8, 2)}, tmp_path / "prior.pt", WAYS[way])
    report = import_checkpoint(tmp_path / "out", priors=[file], **known)
    assert report["model"] == "llamagen"
    assert report["parameters"]["prior"] == sum(weight.numel() for weight in state.values())


def test_the_image_size_is_asked_for(files, tmp_path):
    known, state = files
    file = save(state, tmp_path / "prior.pt")
    known["tokenizer_config"] = write_config({"codebook_size": 64}, tmp_path / "tokenizer.json")
    with pytest.raises(VqdeployError, match=r"image_size cannot be read off .* add --tokenizer-config FILE"):
        import_checkpoint(tmp_path / "out", priors=[file], **known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.attention.wqkv.weight": torch.zeros(96, 64)}, "shares keys among its heads"),
        ({"tok_embeddings.weight": torch.zeros(32, 64)}, "for another tokenizer; expected 64, found 32"),
        ({"layers.1.attention.wo.weight": None}, r"lacks layers\.1\.attention\.wo\.weight"),
        ({"layers.0.attention.wq_norm.weight": torch.zeros(3)}, r"has layers\.0\.attention\.wq_norm\.weight, which"),
        ({"norm.weight": torch.zeros(63)}, r"norm\.weight .* has the wrong shape"),
        ({"cls_embedding.embedding_table.weight": None}, r"lacks cls_embedding\.embedding_table\.weight"),
        ({"cls_embedding.embedding_table.weight": torch.zeros(1, 64)}, r"has no classes; expected 1 or more"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, r"norm\.weight .* has the wrong type; .*torch\.int8"),
    ],
)
def test_weights_that_do_not_fit(files, tmp_path, changes, message):
    known, state = files
    known["prior_config"] = write_config({"n_head": 4}, tmp_path / "heads.json")
    changed = {key: weight for key, weight in (state | changes).items() if weight is not None}
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "out", priors=[save(changed, tmp_path / "prior.pt")], **known)
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_fit(files, tmp_path):
    known, state = files
    known["prior_config"] = write_config({"n_head": 5}, tmp_path / "heads.json")
    with pytest.raises(ArtifactError, match="do not describe a model"):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 2}, "n_kv_head differs; expected 4, found 2"),
        ({"n_layer": 9}, "n_layer differs"),
        ({"num_classes": 5}, "num_classes differs"),
        ({"block_size": 576}, "block_size differs; expected 64, found 576"),
        ({"rope_base": 500000}, "rope_base differs"),
        ({"norm_eps": "1e-6"}, "norm_eps differs"),
        ({"norm_eps": "small"}, "norm_eps of the configuration is malformed; expected a number"),
        ({"n_head": 0}, "do not describe a model"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(files, tmp_path, changes, message):
    known, state = files
    known["prior_config"] = write_config({"n_head": 4, "norm_eps": 1e-5} | changes, tmp_path / "prior.json")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known)


def test_heads_of_a_width_that_is_not_published_are_asked_for(files, tmp_path):
    known, state = files
    del known["prior_config"]
    with pytest.raises(VqdeployError, match=r"n_head cannot be read off .* add --prior-config FILE"):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known)


def test_a_size_beyond_reason(files, tmp_path):
    known, state = files
    known["tokenizer_config"] = write_config({"image_size": 1_000_000}, tmp_path / "tokenizer.json")
    known["prior_config"] = write_config({"n_head": 4}, tmp_path / "heads.json")
    with pytest.raises(ArtifactError, match=r"do not describe a model \(maps of \d+ codes are too large\)"):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known)


def test_a_tokenizer_of_vqgan_is_another(files, tmp_path):
    known, state = files
    write_tokenizer("taming_vqgan_f8_attn", tmp_path / "taming")
    other = {"tokenizer": tmp_path / "taming" / "taming_vqgan_f8_attn.ckpt"}
    other["tokenizer_config"] = tmp_path / "taming" / "taming_vqgan_f8_attn.json"
    with pytest.raises(ArtifactError, match="is for another tokenizer"):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known | other)
