"""Files of LlamaGen's priors, as each way of training leaves them, and what is wrong with some."""

import argparse

import pytest
import torch
from support.golden import read_golden
from support.public import save, write_config, write_system

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
    with pytest.raises(ArtifactError, match="makes no model"):
        import_checkpoint(tmp_path / "out", priors=[save(state, tmp_path / "prior.pt")], **known)
