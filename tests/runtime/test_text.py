"""A prior that is conditioned on texts: in PyTorch, in a plan, and by an implementation in numpy of its own."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import text_reference
from support.mutations import change_weight, failed, failures
from support.trials import trial

from vqdeploy.bench import bench
from vqdeploy.cli.tasks import Job, run
from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.runtime.condition import Condition
from vqdeploy.runtime.forcing import forced_logits
from vqdeploy.runtime.manifest import FILE, Manifest, TextInfo
from vqdeploy.runtime.sampler import Item
from vqdeploy.verify import verify, verify_package

LENGTH, VOCABULARY = 18, 40
TEXTS = np.random.default_rng(5).integers(0, VOCABULARY, (3, LENGTH))
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def reference(text_system):
    """Weights by their public names, the codebook, and the number of heads, in double precision."""
    prior = text_system.prior
    weights = {name: weight.double().numpy() for name, weight in prior.state_dict().items()}
    return weights, prior.codebook.double().numpy(), prior.config.heads


@pytest.fixture(scope="module")
def forced(text_system, reference):
    """Codes [B, positions, Q] and the logits of the reference for them."""
    grid = text_system.prior.config.grid
    codes = np.random.default_rng(1).integers(0, 64, (2, grid[0] * grid[1], grid[2]))
    return codes, np.array([text_reference.forced(*reference, *each) for each in zip(TEXTS, codes, strict=False)])


@pytest.fixture(scope="module")
def greedy(text_system, reference):
    grid = text_system.prior.config.grid
    return text_reference.greedy(*reference, TEXTS[0], grid[0] * grid[1], grid[2]).reshape(1, *grid)


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@torch.no_grad()
def test_logits_in_pytorch(text_system, forced):
    codes, expected = forced
    shaped = torch.from_numpy(codes).view(len(codes), *text_system.prior.config.grid)
    close(text_system.prior.logits(shaped, torch.from_numpy(TEXTS[:2])).flatten(1, 2).numpy(), expected)


def test_greedy_codes_in_pytorch(text_system, greedy):
    depth, size = greedy.shape[-1], text_system.prior.config.codebook_size
    ones = torch.ones(1, depth)
    noise = torch.zeros(1, depth, size)
    found = text_system.prior.generate(torch.from_numpy(TEXTS[:1]), lambda position: noise, ones, ones.long(), ones)
    np.testing.assert_array_equal(found, greedy)


@pytest.mark.parametrize("known", [0, 1, 7])
def test_logits_of_a_plan(text_pipeline, forced, known):
    codes, expected = forced
    given = np.where(np.arange(codes.shape[1])[:, None] < known, codes, -1).reshape(-1, *text_pipeline.grid)
    close(forced_logits(text_pipeline, codes, given, TEXTS[:2]), expected[:, known:])


def test_greedy_codes_of_a_plan(text_pipeline, greedy):
    np.testing.assert_array_equal(text_pipeline.generate(TEXTS[:1], **GREEDY).codes, greedy)


def test_every_token_of_a_text_matters(text_pipeline):
    texts = np.repeat(TEXTS[:1], LENGTH + 1, 0)
    for place in range(LENGTH):
        texts[place, place] = (texts[place, place] + 1) % VOCABULARY
    codes = text_pipeline.generate(texts, seed=4, temperature=1.0, top_k=0, top_p=1.0).codes
    shared = text_pipeline.complete(np.full_like(codes, -1)[:1], texts[-1:], seed=4).options
    assert shared["texts"] == texts[-1:].tolist()
    logits = forced_logits(text_pipeline, codes.reshape(LENGTH + 1, -1, 2) * 0, np.full_like(codes, -1), texts)
    for place in range(LENGTH):
        assert np.abs(logits[place] - logits[-1]).max() > 1e-2


# Requests


@pytest.mark.parametrize("seed", range(3))
def test_images_that_come_and_go_are_the_images_alone(text_pipeline, seed):
    assert trial(text_pipeline, seed) >= 4


def test_an_image_is_the_same_alone_and_in_a_split_batch(text_package, text_pipeline, tmp_path):
    codes = text_pipeline.generate(TEXTS, seed=3).codes
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(text_pipeline.generate([text], seed=3, first_image=i).codes[0], codes[i])
    assert (codes[0] != codes[1]).any()


def test_texts_as_lists_and_as_other_integers(text_pipeline):
    codes = text_pipeline.generate(TEXTS[:1]).codes
    for texts in (TEXTS[:1].tolist(), TEXTS[:1].astype(np.uint8), TEXTS[:1].astype(np.int32)):
        np.testing.assert_array_equal(text_pipeline.generate(texts).codes, codes)


def test_inpainting_goes_on_from_the_first_rows(text_pipeline):
    whole = text_pipeline.generate(TEXTS, seed=2).codes
    known = whole.copy()
    known[:, 2:] = -1
    np.testing.assert_array_equal(text_pipeline.complete(known, TEXTS, seed=2).codes, whole)
    images = text_pipeline.decode(whole)
    output = text_pipeline.inpaint(images, TEXTS, mask_ratio=0.5, completions=2, seed=2)
    assert output.options["texts"] == TEXTS.tolist() * 2
    np.testing.assert_array_equal(output.codes[:3, :2], text_pipeline.encode(images)[:, :2])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, r"this prior needs texts; expected token ids \[B, 18\], found none"),
        ([3], r"conditioned on texts; expected token ids \[B, 18\], found \[1\]"),
        (7, r"conditioned on texts; expected token ids \[B, 18\], found \[\]"),
        (TEXTS[0], r"found \[18\]"),
        (TEXTS[:, :17], r"found \[3, 17\]"),
        (TEXTS[None], r"found \[1, 3, 18\]"),
        ([[1] * 18, [2] * 17], "the list of texts is malformed; expected integers"),
        (TEXTS.astype(float), "malformed; expected integers"),
        (TEXTS.astype(bool), "malformed; expected integers"),
        (TEXTS.astype(str), "malformed; expected integers"),
        (np.where(np.eye(3, 18, dtype=bool), 40, TEXTS), r"a token id is out of range; expected 0\.\.39, found 40"),
        (np.where(np.eye(3, 18, dtype=bool), -1, TEXTS), r"expected 0\.\.39, found -1"),
        (np.zeros((0, 18), int), "the request has no images"),
    ],
)
def test_malformed_texts_are_refused(text_pipeline, texts, message):
    with pytest.raises(VqdeployError, match=message):
        text_pipeline.generate(texts)


def test_texts_that_are_too_few(text_pipeline):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(VqdeployError, match=r"expected token ids \[2, 18\], found \[3, 18\]"):
        text_pipeline.inpaint(images, TEXTS, mask_ratio=0.5)
    with pytest.raises(VqdeployError, match="needs texts"):
        text_pipeline.inpaint(images, mask_ratio=0.5)


def test_a_plan_of_the_other_kind(text_pipeline, pipeline):
    with pytest.raises(VqdeployError, match=r"too many labels; expected a list .* found an array \[3, 18\]"):
        pipeline.generate(TEXTS)
    with pytest.raises(VqdeployError, match="this prior has no labels; expected token ids of texts, found cat"):
        text_pipeline.label("cat")
    for each, condition in ((pipeline, TEXTS[0]), (text_pipeline, 1), (text_pipeline, TEXTS[0][1:])):
        item = Item(np.full(each.grid, -1), condition, 0, 0, each.options())
        with each.sampler(1) as sampler, pytest.raises(VqdeployError, match=r"conditioned on texts|too many labels"):
            sampler.admit(0, item)


# The command line


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "a.npy", TEXTS)
    np.savez(tmp_path / "a.npz", text_ids=TEXTS.astype(np.int32))
    np.save(tmp_path / "one.npy", TEXTS[:1])
    return tmp_path


def job(plan, folder, texts, **options):
    texts = texts and folder / texts
    return run(Job(plan, output=folder / "a.png", text_ids=texts, options={"seed": 0}, **options))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_run_generates_a_row_for_each_text(text_plan, files, name):
    result = job(text_plan, files, name, num_images=2)
    assert result["images"] == 6
    assert result["options"]["texts"] == np.repeat(TEXTS, 2, 0).tolist()


def test_run_completes_images(text_plan, text_pipeline, files):
    from vqdeploy.runtime.images import write_grid

    write_grid(files / "in.png", text_pipeline.generate(TEXTS[:1]).images, 1, {})
    result = job(text_plan, files, "one.npy", task="inpaint", inputs=[files / "in.png"] * 2, completions=1)
    assert result["options"]["texts"] == TEXTS[[0, 0]].tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {}, "this prior needs texts; expected --text-ids FILE, found none"),
        (None, {"labels": ["1"]}, "--label does not fit this prior; expected --text-ids, found --label"),
        ("a.npy", {"text_features": Path("b.npy")}, "--text-features does not fit this prior; expected --text-ids"),
        ("missing.npy", {}, "missing.npy"),
        ("other.npz", {}, "an NPZ with text_ids"),
        ("text.npy", {}, "text.npy does not hold texts"),
        ("objects.npy", {}, "objects.npy does not hold texts"),
        ("lies.npy", {}, "lies.npy does not hold texts"),
        ("flat.npy", {}, r"expected token ids \[B, 18\], found \[54\]"),
        ("a.npy", {"task": "encode"}, "--text-ids is not an .* task; expected --task generate or inpaint"),
    ],
)
def test_files_that_are_no_texts(text_plan, files, name, options, message):
    np.savez(files / "other.npz", ids=TEXTS)
    np.save(files / "flat.npy", TEXTS.ravel())
    np.save(files / "objects.npy", np.array([{}]), allow_pickle=True)
    (files / "text.npy").write_text("a red bus")
    content = bytearray((files / "a.npy").read_bytes())
    (files / "lies.npy").write_bytes(content.replace(b"(3, 18)", b"(9**9,)"[:7]))
    with pytest.raises(VqdeployError, match=message):
        job(text_plan, files, name, **options)


def test_texts_for_a_plan_with_labels(plan, files):
    with pytest.raises(VqdeployError, match="--text-ids does not fit this prior; expected --label"):
        job(plan, files, "a.npy")


def test_inspect_says_what_the_condition_is(command, text_plan):
    assert "length 18, vocabulary 40" in command("inspect", text_plan).stdout


def test_bench_takes_texts(text_plan, text_system, artifacts):
    report = bench(
        text_plan, ["generate"], [2], 0, 1, baselines=["eager"], checkpoint=artifacts.checkpoint("text"), threads=1
    )
    assert {result["name"] for result in report["results"]} == {"vqdeploy", "eager"}


# Verify


def test_a_good_plan_passes(text_plan, text_package, text_system):
    assert failures(verify(text_plan, text_system)) == set()
    assert failures(verify_package(text_package, text_system)) == set()


@pytest.fixture
def copy(text_package, tmp_path):
    return shutil.copytree(text_package, tmp_path / "package")


WRONG = "step: cached step: largest difference of logits", "step: prefix: largest", "generate: full distribution"


def test_ids_that_are_off_by_one(copy, text_system):
    def change(array):
        array[:] = np.roll(array, 1, 0)

    change_weight(copy, text_system.prior.cond_emb.weight, change)
    failed(failures(verify_package(copy, text_system)), *WRONG)


@pytest.mark.parametrize("place", [0, LENGTH - 1])
def test_a_place_of_the_text_without_its_embedding(copy, text_system, place):
    def change(array):
        array[place] = 0

    change_weight(copy, text_system.prior.pos_emb_cond[0], change)
    failed(failures(verify_package(copy, text_system)), *WRONG)


def test_a_text_that_is_not_prefilled(text_plan, text_system, monkeypatch):
    monkeypatch.setattr(AutoregressiveSampler, "_prefill", lambda *arguments: None)
    failed(failures(verify(text_plan, text_system)), *WRONG)


def test_a_text_that_is_shifted_by_a_token(text_plan, text_system, monkeypatch):
    write = Condition.write
    shift = lambda self, inputs, row, text, none: write(self, inputs, row, np.roll(text, 1), none)  # noqa: E731
    monkeypatch.setattr(Condition, "write", shift)
    failed(failures(verify(text_plan, text_system)), *WRONG)


# Hostile manifests


def refuses(folder, change, message):
    manifest = json.loads((folder / FILE).read_text())
    change(manifest)
    with pytest.raises(ArtifactError, match=message) as caught:
        Manifest.from_dict(manifest)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"length": 0, "vocabulary": 40}, "1 or more"),
        ({"length": -18, "vocabulary": 40}, "1 or more"),
        ({"length": 18, "vocabulary": 0}, "1 or more"),
        ({"length": 2**31, "vocabulary": 40}, "1 or more"),
        ({"length": 18, "vocabulary": 2**63}, "1 or more"),
        ({"length": 18}, "a vocabulary or a width"),
        ({"length": 18, "vocabulary": 40, "width": 8}, "a vocabulary or a width"),
        ({"length": 18.0, "vocabulary": 40}, "malformed"),
        ({"length": True, "vocabulary": 40}, "malformed"),
        ({"length": 18, "vocabulary": 40, "merges": []}, "unknown keys"),
        ([18, 40], "malformed"),
    ],
)
def test_manifests_that_lie_about_texts(text_package, text, message):
    refuses(text_package, lambda manifest: manifest["sampling"].update(text=text), message)


@pytest.mark.parametrize("beside", [{"classes": 3}, {"no_label": 1}, {"kind": "masked"}, {"kind": "hierarchical"}])
def test_manifests_with_texts_and_labels(text_package, beside):
    refuses(text_package, lambda manifest: manifest["sampling"].update(beside), "sampling.text of the manifest")


def test_manifests_with_texts_and_names_of_classes(text_package):
    refuses(text_package, lambda manifest: manifest.update(labels=["a cat"]), "sampling.text of the manifest")


@pytest.mark.parametrize("text", [None, TextInfo(17, 40), TextInfo(2**30, 40)])
def test_texts_that_the_graph_does_not_take(copy, text, tmp_path):
    manifest = Manifest.from_dict(json.loads((copy / FILE).read_text()))
    changed = dataclasses.replace(manifest, sampling=dataclasses.replace(manifest.sampling, text=text))
    (copy / FILE).write_text(json.dumps(changed.to_dict()))
    build(copy, tmp_path / "a.plan", portable=True)
    with pytest.raises(ArtifactError, match="stage step does not fit its sampler; expected an input"):
        load(tmp_path / "a.plan")
