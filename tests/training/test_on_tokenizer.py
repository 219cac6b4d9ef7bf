"""A prior is trained on a tokenizer that was imported."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.public import write_tokenizer

from vqdeploy import checkpoint
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.errors import VqdeployError
from vqdeploy.systems import preset
from vqdeploy.training import train

pytestmark = pytest.mark.slow

SHORT = {"prior_steps": 2, "classifier_steps": 2, "batch_size": 4, "samples": 10}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    _, file, _, config = write_tokenizer("vqgan", folder)
    import_checkpoint(folder / "vqgan", file, tokenizer_config=config)
    return folder / "vqgan"


@pytest.mark.parametrize("model", ["vqgan", "movq"])
def test_the_tokenizer_stays_as_it_is(tmp_path, tokenizer, model, monkeypatch):
    small = preset(model, "tiny")
    small = replace(small, prior=replace(small.prior, width=32, layers=1, heads=2))
    monkeypatch.setattr("vqdeploy.training.run.find_preset", lambda *_: small)
    monkeypatch.setattr("vqdeploy.training.prior._SAMPLES", 1)
    report = train(model, data="digits", output=tmp_path / "out", tokenizer=tokenizer, **SHORT)
    system, kept = checkpoint.load(tmp_path / "out"), checkpoint.load(tokenizer)
    for name, weight in kept.tokenizer.state_dict().items():
        assert torch.equal(system.tokenizer.state_dict()[name], weight), name
    assert system.config.tokenizer == kept.config.tokenizer
    assert system.prior.config.grid == kept.config.tokenizer.grid
    assert system.config.source == "taming"
    assert set(report["seconds"]) == {"classifier", "prior"}
    assert report["recipe"]["stored_dtype"] == "float32"  # its codes would change


def test_a_tokenizer_of_half_precision_is_stored_so(tmp_path, monkeypatch):
    monkeypatch.setattr("vqdeploy.training.prior._SAMPLES", 1)
    half = checkpoint.SHIPPED / "movq" / "tiny"
    report = train("movq", data="digits", output=tmp_path / "out", tokenizer=half, **SHORT)
    assert report["recipe"]["stored_dtype"] == "float16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(half / "model.safetensors").items():
        if name.startswith("tokenizer."):
            assert torch.equal(stored[name], weight), name
    assert {weight.dtype for weight in stored.values() if weight.is_floating_point()} == {torch.float16}


def test_another_kind_of_tokenizer_is_refused(tmp_path, tokenizer):
    with pytest.raises(VqdeployError, match=r"rqvae has another kind of tokenizer\. Fix: --model vqgan"):
        train("rqvae", output=tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(VqdeployError, match="67m has no prior to train"):
        train("movq", "67m", output=tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
