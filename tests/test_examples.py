"""The scripts in `examples/` run."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset

from vqdeploy import checkpoint
from vqdeploy.files import read_json
from vqdeploy.runtime.images import read
from vqdeploy.systems import create, definition, preset
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.data import open_data
from vqdeploy.verify import verify

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def movq(artifacts):
    """A plan for images of the digits' size, untrained."""
    config = preset("movq", "tiny")
    conv = replace(config.tokenizer.conv, res_blocks=0)
    config = replace(config, tokenizer=replace(config.tokenizer, conv=conv), prior=replace(config.prior, layers=1))
    return artifacts.plan(create(config))


def test_masked_reconstruction(movq, tmp_path):
    load_script("masked_reconstruction").main(str(movq), str(EXAMPLES / "digits"), str(tmp_path / "m.png"))
    with Image.open(tmp_path / "m.png") as sheet:
        assert sheet.size == (10 * 34 - 2, 5 * 34 - 2)
        last = np.asarray(sheet)[-32:, :32]
    np.testing.assert_array_equal(last, read(EXAMPLES / "digits" / "0.png"))


def test_accuracy_by_steps(movq, monkeypatch, capsys):
    script = load_script("accuracy_by_steps")
    for name, value in {"SAMPLES": 20, "STEPS": (1, 8), "RATIOS": (0.5,)}.items():
        monkeypatch.setattr(script, name, value)
    judge = ImageClassifier(10, definition("movq").recipe("tiny"))
    monkeypatch.setattr(script, "train_judge", lambda resolution: judge)
    held_out = open_data("digits", 32).held_out
    monkeypatch.setattr(script, "open_data", lambda *_: SimpleNamespace(held_out=Subset(held_out, range(20))))
    script.main(str(movq), "1.5")
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == ["steps", "---", "1", "8", "masked", "---", "50%"]


def test_precisions(artifacts, system, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = load_script("precisions")
    judged = []
    judge = SimpleNamespace(accuracy=lambda images, labels: judged.append((images.shape, labels.tolist())) or 0.95)
    replaced = {"SAMPLES": 40, "TURNS": 2, "train_judge": lambda _: judge, "verify": lambda plan: verify(plan, system)}
    for name, value in replaced.items():
        monkeypatch.setattr(script, name, value)
    script.main(*(str(artifacts.plan("rqvae", *dtype)) for dtype in ([], ["int8"])))
    assert judged == 2 * [((40, 3, 16, 16), [i % 3 for i in range(40)])]
    lines = capsys.readouterr().out.splitlines()
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    exact, int8 = (dict(zip(names, row, strict=True)) for row in rows)
    assert [row["plan"] for row in (exact, int8)] == ["rqvae-fp32", "rqvae-int8"]
    assert float(exact["size"].split()[0]) > float(int8["size"].split()[0])
    assert 1e-6 < float(int8["KL divergence, nats"]) < 5e-4
    assert 1e-3 < float(int8["largest difference of logits, of the largest"]) < 0.1
    assert exact["worst decoded image"] == int8["worst decoded image"]  # the decoder is in fp32 in both
    assert int8["class accuracy"] == "95.0% (83.5% to 98.6%)"
    assert exact["times as fast"] == "1.00"


def test_compare_tokenizers(tmp_path, monkeypatch, capsys):
    script = load_script("compare_tokenizers")
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


@pytest.fixture(scope="module")
def tiny_vit(artifacts):
    return artifacts.plan(checkpoint.default("vitvqgan"))


@pytest.mark.slow
def test_linear_probe(tiny_vit, tmp_path, capsys):
    """The best layer knows the classes of 95 % of the digits, the codes alone do not."""
    load_script("linear_probe").main(str(tiny_vit), str(tmp_path / "probe.png"), "0", "2")
    first, best = (float(line.split(":")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines())
    assert best >= 95
    assert first < 85
    with Image.open(tmp_path / "probe.png") as plot:
        assert plot.format == "PNG"


def test_time_by_position(tiny_vit, tmp_path, capsys):
    load_script("time_by_position").main(str(tiny_vit), str(tmp_path / "curve.png"), "1")
    assert "first quarter" in capsys.readouterr().out
    with Image.open(tmp_path / "curve.png") as plot:
        assert plot.format == "PNG"


def test_quantizer_speed(monkeypatch, capsys):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    script = load_script("quantizer_speed")
    monkeypatch.setattr(script, "KINDS", ("plan", "eager"))  # compiling takes long
    monkeypatch.setattr(script, "memory_of", lambda *_: 2**20)
    script.main("300", "1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " times the plan " in line] == ["plan", "eager"]
    assert all(line.endswith("0.00e+00 of the codes differ") for line in lines if " times the plan " in line)
    assert '"Gemm"' in lines[-1]


def test_emoji(tmp_path, capsys):
    """Ten bases a class, of which one is held out, without its skin tones."""
    package = tmp_path / "package"
    (package / "img" / "google" / "64").mkdir(parents=True)
    kinds = [("Flags", "country-flag"), ("People & Body", "hands"), ("People & Body", "person-role"), ("Component", "")]
    entries = []
    for number, (category, part) in ((i, kind) for kind in kinds for i in range(10)):
        names = [f"{part}{number}{tone}.png" for tone in ("", "-1f3fb", "-1f3ff")]
        for name in names:
            Image.new("RGBA", (64, 64)).save(package / "img" / "google" / "64" / name)
        entry = {"image": names[0], "has_img_google": True, "category": category, "subcategory": part}
        tones = {str(i): {"image": name, "has_img_google": True} for i, name in enumerate(names[1:])}
        entries.append(entry | ({"skin_variations": tones} if category.startswith("People") else {}))
    (package / "emoji.json").write_text(json.dumps(entries))
    output = tmp_path / "sorted"
    load_script("emoji").main(str(package), str(output))
    found = {
        part: {folder.name: sorted(path.name for path in folder.iterdir()) for folder in (output / part).iterdir()}
        for part in ("train", "held-out")
    }
    assert {name: len(files) for name, files in found["train"].items()} == {"flags": 9, "hands": 27, "people": 27}
    for name, (held_out,) in found["held-out"].items():
        assert not any(file.startswith(held_out.removesuffix(".png")) for file in found["train"][name])
    data = open_data(str(output / "train"), 64, output / "held-out")
    assert data.labels == ("flags", "hands", "people")
    with pytest.raises(SystemExit, match="exists already"):
        load_script("emoji").main(str(package), str(output))
