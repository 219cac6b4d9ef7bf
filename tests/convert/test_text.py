"""A text-conditioned RQ-Transformer in the public layout, held against an implementation in numpy of its own."""

from functools import partial

import numpy as np
import pytest
import torch
from support.golden import read_golden
from support.public import kakaobrain, save, write_config, write_tokenizer
from support.text_reference import logits_after

from vqdeploy import checkpoint
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.export.functions import OPSET
from vqdeploy.export.package import write_package
from vqdeploy.export.rqtransformer import stages
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import FORMAT, Manifest, Provenance

LENGTH, VOCABULARY = 12, 50
PLACES = [(0, 0), (0, 3), (1, 1), (7, 2), (40, 0), (63, 3)]


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def reference_of(state, tensors, config):
    """The function of `support.text_reference` with weights in double precision."""
    weights = {name: weight.double().numpy() for name, weight in state.items()}
    return partial(logits_after, weights, tensors["in/codebook"].double().numpy(), config["body"]["block"]["n_head"])


def at_places(reference, texts, codes):
    """Logits [B, places, K] given texts and codes [B, positions, Q]."""
    return np.array(
        [
            [reference(text, rows[:place], rows[place, :depth]) for place, depth in PLACES]
            for text, rows in zip(texts, codes, strict=True)
        ]
    )


def test_the_reference_is_what_was_recorded_for_labels():
    config, tensors, state = read_golden("rqtransformer")
    labels, codes = tensors["in/class"].numpy()[:, None], tensors["in/codes"].flatten(1, 2).numpy()
    recorded = np.stack([tensors["out/logits"].flatten(1, 2)[:, place, depth] for place, depth in PLACES], 1)
    close(at_places(reference_of(state, tensors, config), labels, codes), recorded)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The arguments of an import, the reference, and the folder."""
    folder = tmp_path_factory.mktemp("text")
    config, tensors, state = read_golden("rqtransformer")
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cond_emb.weight": (VOCABULARY, 64),
        "pos_emb_cond": (1, LENGTH, 64),
        "cond_classifier.layer_norm.weight": (64,),
        "cond_classifier.layer_norm.bias": (64,),
        "cond_classifier.linear.weight": (VOCABULARY, 64),
        "cond_classifier.linear.bias": (VOCABULARY,),
    }
    state |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config |= {"vocab_size_cond": VOCABULARY, "block_size_cond": LENGTH}
    options = write_config(
        {"arch": config, "sampling": {"temp": 1.0, "top_k": 64, "top_p": 0.7}}, folder / "prior.json"
    )
    _, tokenizer, _, tokenizer_config = write_tokenizer("rqvae", folder)
    given = {"tokenizer": tokenizer, "tokenizer_config": tokenizer_config, "prior_config": options}
    given["priors"] = [save(state, folder / "prior.pt", kakaobrain)]
    return given, reference_of(state, tensors, config), folder


@pytest.fixture(scope="module")
def system(public):
    given, _, folder = public
    import_checkpoint(folder / "out", **given)
    return checkpoint.load(folder / "out")


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


@torch.no_grad()
def test_import(public, system, texts):
    assert (system.prior.config.classes, system.prior.config.condition_length) == (VOCABULARY, LENGTH)
    assert system.config.sampling.top_p == 0.7
    codes = np.random.default_rng(1).integers(0, 64, (2, 64, 4))
    logits = system.prior.logits(torch.from_numpy(codes).view(2, 8, 8, 4), torch.from_numpy(texts)).flatten(1, 2)
    found = np.stack([logits[:, place, depth] for place, depth in PLACES], 1)
    close(found, at_places(public[1], texts, codes))


def test_texts_have_no_names(public):
    given, _, folder = public
    names = folder / "names.txt"
    names.write_text("\n".join(map(str, range(VOCABULARY))))
    with pytest.raises(VqdeployError, match="conditioned on texts has no labels; expected no --labels"):
        import_checkpoint(folder / "named", **given, labels=names)
    assert not (folder / "named").exists()


def test_plan(public, system, texts, tmp_path):
    """The step alone, which takes a text and codes in one call; noise makes it draw the codes of the next position."""
    described = Manifest(FORMAT, "text", "fp32", OPSET, Provenance("test"), (), {})
    write_package(stages(system.prior), tmp_path / "package", described)
    build(tmp_path / "package", tmp_path / "plan")
    pipeline = load(tmp_path / "plan", threads=1)
    codes = np.random.default_rng(2).integers(0, 64, (2, 64, 4))
    expected = at_places(public[1], texts, codes)
    caches = {i.name: i for i in pipeline.manifest.stage("step").inputs if i.name.startswith("past_")}
    empty = {name: np.zeros(info.concrete({"batch": 2}), np.float32) for name, info in caches.items()}
    for i, (place, depth) in enumerate(PLACES):
        found = pipeline.run(
            "step",
            codes=np.concatenate([np.zeros((2, LENGTH, 4), int), codes[:, :place]], 1),
            text=texts,
            position=np.zeros(2, int),
            noise=(1e9 * np.eye(64, dtype=np.float32))[codes[:, place]],
            temperature=np.ones((2, 4), np.float32),
            top_k=np.full((2, 4), 64),
            top_p=np.ones((2, 4), np.float32),
            **empty,
        )
        close(found["logits"][:, depth], expected[:, i])
        assert np.array_equal(found["next_codes"], codes[:, place])
