"""Public checkpoints of every code base, imported by the command line: what they compute is what was recorded."""

import json

import pytest
import torch

from support.golden import assert_close, read_golden
from vqdeploy import checkpoint, cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `vqdeploy import`; returns its report."""

    def run_import(*arguments):
        monkeypatch.setattr("sys.argv", ["vqdeploy", "import", "--json", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert not end.value.code, captured.err
        return json.loads(captured.out)

    return run_import


def taming_yaml(config):
    """The `model` section that a public YAML has."""
    return {"model": {"base_learning_rate": "4.5e-6", "target": "taming.models.vqgan.VQModel", "params": config}}


TOKENIZERS = {  # golden file: format, how its file holds the weights, its configuration, and the system
    "movq": ("movqgan", lambda state: state, taming_yaml, "movq"),
    "movqgan_ema": ("movqgan", lambda state: {"state_dict": state, "epoch": 3}, taming_yaml, "movq"),
    "vqgan": ("taming", lambda state: {"state_dict": state}, taming_yaml, "vqgan"),
    "taming_vqgan_f8_attn": ("taming", lambda state: {"state_dict": state}, taming_yaml, "vqgan"),
    "taming_vqgan_gumbel": ("taming", lambda state: {"state_dict": state}, taming_yaml, "vqgan"),
    "diffusers_movq": ("diffusers", lambda state: state, lambda config: config, "movq"),
    "diffusers_vq": ("diffusers", lambda state: state, lambda config: config, "vqgan"),
    "diffusers_amused": ("diffusers", lambda state: state, lambda config: config, "vqgan"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokenizer(run, tmp_path, name):
    expected_format, wrap, configure, model = TOKENIZERS[name]
    config, tensors, state = read_golden(name)
    torch.save(wrap(state), tmp_path / "weights.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(configure(config)))
    report = run("--tokenizer", tmp_path / "weights.ckpt", "-o", tmp_path / "out")
    assert (report["formats"], report["model"]) == ([expected_format], model)
    tokenizer = checkpoint.load(tmp_path / "out").tokenizer
    codes, vectors = tokenizer.quantizer.encode(tokenizer.latents(tensors["in/image"]))
    assert torch.equal(codes[..., 0], tensors["out/codes"])
    if "out/z_q" in tensors:
        assert_close(vectors.permute(0, 3, 1, 2), tensors["out/z_q"])
    assert_close(tokenizer.decode(codes), tensors["out/reconstruction"])
