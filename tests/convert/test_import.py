"""Public checkpoints of every code base, imported by the command line: what they compute is what was recorded."""

import json

import pytest
import torch
from support.golden import assert_close, read_golden, recorded_codes
from support.public import TOKENIZERS, write_system, write_tokenizer

from vqdeploy import checkpoint, cli
from vqdeploy.reference.guidance import without_condition


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


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokenizer(run, tmp_path, name):
    report = run(*write_tokenizer(name, tmp_path), "-o", tmp_path / "out")
    assert (report["formats"], report["model"]) == ([TOKENIZERS[name][0]], TOKENIZERS[name][1])
    _, tensors, _ = read_golden(name)
    tokenizer = checkpoint.load(tmp_path / "out").tokenizer
    codes = tokenizer.encode(tensors["in/image"])
    expected = recorded_codes(tensors)
    assert torch.equal(codes.view(expected.shape), expected)
    image = tokenizer.decode(codes)
    assert_close(image.clamp(-1, 1) if name == "var_vae" else image, tensors["out/reconstruction"])
    if "out/z" in tensors and name != "rqvae":
        assert_close(tokenizer.latents(tensors["in/image"]).permute(0, 3, 1, 2), tensors["out/z"])


def test_averages_that_are_taken_are_named(run, tmp_path):
    for name, taken in (("rqvae", "state_dict_ema"), ("llamagen_vq", "ema")):
        (note,) = run(*write_tokenizer(name, tmp_path), "-o", tmp_path / "out")["notes"]
        assert note == f"moving averages are taken, {taken} of {name}.ckpt; --raw takes the weights themselves"


@torch.no_grad()
def test_raw_weights_are_taken_when_they_are_asked_for(run, tmp_path):
    arguments = write_tokenizer("movqgan_ema", tmp_path)
    assert "moving averages" in run(*arguments, "-o", tmp_path / "averaged")["notes"][0]
    run(*arguments, "--raw", "-o", tmp_path / "raw")
    _, tensors, _ = read_golden("movqgan_ema")
    tokenizer = checkpoint.load(tmp_path / "raw").tokenizer
    codes = tokenizer.encode(tensors["in/image"])
    assert torch.equal(codes[..., 0], tensors["out/raw_codes"])
    assert_close(tokenizer.decode(codes), tensors["out/raw_reconstruction"])


PRIORS = {  # golden file of the prior: formats, system
    "rqtransformer": (["rq-vae-transformer", "rq-vae-transformer"], "rqvae"),
    "vitvq_gpt": (["enhancing-transformers", "enhancing-transformers"], "vitvqgan"),
    "taming_gpt": (["taming", "taming"], "vqgan"),
    "maskgit_v1": (["taming", "maskgit-pytorch"], "movq"),
    "maskgit": (["taming", "maskgit-pytorch"], "movq"),
    "llamagen_gpt": (["llamagen", "llamagen"], "llamagen"),
    "llamagen_gpt_text": (["llamagen", "llamagen"], "llamagen"),
    "maskgit_jax_transformer": (["maskgit-jax", "maskgit-jax"], "maskgit"),
    "var": (["var", "var"], "var"),
    "var_shared": (["var", "var"], "var"),
}


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_prior(run, tmp_path, name):
    report = run(*write_system(name, tmp_path), "-o", tmp_path / "out")
    assert (report["formats"], report["model"]) == PRIORS[name]
    _, tensors, _ = read_golden(name)
    prior = checkpoint.load(tmp_path / "out").prior
    size = prior.config.codebook_size
    codes = tensors["in/codes" if "in/codes" in tensors else "out/codes"].view(-1, *prior.config.grid)
    codes = codes.clamp(max=size)  # where masked, some public codes have another number
    expected = tensors["out/logits"].view(*codes.shape, -1)[..., :size]
    # 5e-5: what the approximation of GELU by tanh, or another epsilon, would be off by.
    conditions = tensors.get("in/class", tensors.get("in/caption"))
    difference = (prior.logits(codes, conditions) - expected).abs().max() / expected.abs().max()
    assert difference < 5e-5
    if "out/logits_unconditional" in tensors:
        none = without_condition(prior, conditions)
        assert_close(prior.logits(codes, none), tensors["out/logits_unconditional"].view(*codes.shape, -1)[..., :size])


@torch.no_grad()
def test_priors_of_two_levels_in_any_order(run, tmp_path):
    run(*write_system("pixelsnail", tmp_path), "-o", tmp_path / "out")
    levels = checkpoint.load(tmp_path / "out").prior.levels
    for level, name in zip(levels, ("top", "bottom"), strict=True):
        _, tensors, _ = read_golden(f"pixelsnail_{name}")
        condition = level.embed_condition(torch.zeros(2, dtype=torch.int64), tensors.get("in/condition"))
        assert_close(level(tensors["in/codes"], condition).permute(0, 3, 1, 2), tensors["out/logits"])


@torch.no_grad()
def test_a_whole_net2net_has_its_tokenizer_and_samples_as_it_did(run, tmp_path):
    run(*write_system("taming_gpt", tmp_path), "-o", tmp_path / "out")
    _, tensors, _ = read_golden("taming_gpt")
    system = checkpoint.load(tmp_path / "out")
    codes = system.tokenizer.encode(tensors["in/image"])
    assert torch.equal(codes.flatten(1), tensors["out/codes"])
    labels, size = tensors["in/class"], system.prior.config.codebook_size
    options = [torch.ones(len(labels), 1), torch.ones(len(labels), 1, dtype=torch.int64), torch.ones(len(labels), 1)]
    drawn = system.prior.generate(labels, lambda position: torch.zeros(len(labels), 1, size), *options)
    assert torch.equal(drawn.flatten(1), tensors["out/greedy_codes"])
    assert_close(system.tokenizer.decode(drawn), tensors["out/greedy_image"])


def test_labels(run, tmp_path):
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / "lines.txt").write_text("\n".join(names))
    (tmp_path / "list.json").write_text(json.dumps(names))
    (tmp_path / "index.json").write_text(json.dumps({str(i): [f"n{i}", name] for i, name in enumerate(names)}))
    (tmp_path / "twice.txt").write_text("\n".join([*names[:8], "crane", "crane"]))
    arguments = write_system("taming_gpt", tmp_path)
    run(*arguments, "--labels", tmp_path / "twice.txt", "-o", tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").config.labels[7:] == ("kind 7", "crane (8)", "crane (9)")
    for file in ("lines.txt", "list.json", "index.json"):
        run(*arguments, "--labels", tmp_path / file, "-o", tmp_path / "out")
        assert checkpoint.load(tmp_path / "out").config.labels == tuple(names)


def test_the_published_sampling_options_are_the_defaults(run, tmp_path):
    arguments = write_system("rqtransformer", tmp_path)
    file = tmp_path / "prior.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"sampling": {"temp": 0.9, "top_k": 4096, "top_p": 0.92}})
    )
    run(*arguments, "-o", tmp_path / "out")
    sampling = checkpoint.load(tmp_path / "out").config.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.9, 0, 0.92)


def test_where_it_came_from_is_kept(run, tmp_path):
    run(*write_system("taming_gpt", tmp_path), "-o", tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").config.source == "taming"
    kept = json.loads((tmp_path / "out" / "import.json").read_text())
    assert kept["files"][0]["file"] == "net2net.ckpt"
    assert kept["files"][0]["taken"] == "state_dict"
