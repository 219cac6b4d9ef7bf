"""The scripts in `examples/` run."""

import importlib.util
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vqdeploy.files import read_json

SCRIPT = Path(__file__).parents[1] / "examples" / "compare_tokenizers.py"


def test_compare_tokenizers(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare_tokenizers", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    step, batches = script.TokenizerTraining.training_step, []

    def recorded(module, batch, index):
        batches.append(batch[0])
        step(module, batch, index)

    monkeypatch.setattr(script.TokenizerTraining, "training_step", recorded)
    small = replace(script.CONV, channels=8, channel_multipliers=(1, 1, 1, 1), latent_channels=8)
    names = ["VQGAN", "MoVQ"]
    small = {name: replace(script.TOKENIZERS[name], conv=small, code_dim=8) for name in names}
    monkeypatch.setattr(script, "TOKENIZERS", small)
    script.main(steps=2, batch_size=2, output=tmp_path)
    assert all(a.equal(b) for a, b in zip(batches[:2], batches[2:], strict=True))  # every tokenizer sees the same
    results = read_json(tmp_path / "results.json")["results"]
    assert [results[name]["bits"] for name in names] == [512, 2048]
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == names
    with Image.open(tmp_path / "reconstructions.png") as sheet:
        assert sheet.size == (8 * 130 - 2, 3 * 130 - 2)
