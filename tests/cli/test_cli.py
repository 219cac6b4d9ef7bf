"""The command line: as typed in a shell for exit codes and interrupts, in process for the rest."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.systems import SMALL

from vqdeploy.precision import PRECISIONS
from vqdeploy.runtime import load
from vqdeploy.runtime.images import read, read_mask, veil
from vqdeploy.systems import create

VERBS = ("models", "train", "export", "build", "run", "verify", "inspect", "env")


@pytest.fixture
def picture(tmp_path):
    """An image file of an odd size."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# As the user typed it


def test_export_as_typed(tiny):
    assert tiny.export.returncode == 0, tiny.export.stderr
    assert tiny.export.stdout == "rqvae-onnx\n"
    assert "PASSED" in tiny.export.stderr


def test_build_needs_no_arguments(tiny):
    assert tiny.build.returncode == 0, tiny.build.stderr
    assert tiny.build.stdout.startswith("rqvae.plan  ")


def test_run_as_typed(tiny):
    assert tiny.run.returncode == 0, tiny.run.stderr
    assert tiny.run.stdout.startswith("rqvae-generate.png  generate in ")
    with Image.open(tiny.folder / "rqvae-generate.png") as image:
        assert image.size == (8 * 34 - 2, 10 * 34 - 2)  # a row for each of ten classes


def test_nothing_else_is_left_behind(tiny):
    assert names(tiny.folder) == ["rqvae-generate.png", "rqvae-onnx", "rqvae.plan"]


def test_verify_needs_no_checkpoint(tiny, vqdeploy):
    code, out, _ = vqdeploy("verify", "--engine", tiny.plan)
    assert code == 0
    assert out.endswith("PASSED in fp32 on cpu\n")


# JSON


def parsed(result):
    """The one JSON object on stdout."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_models_json(vqdeploy):
    listing = parsed(vqdeploy("models", "--json"))
    assert set(listing["rqvae"].values()) <= {"random", "trained"}
    assert {"tiny", "bench", "imagenet-480m"} < set(listing["rqvae"])


def test_env_json(vqdeploy):
    facts = parsed(vqdeploy("env", "--json"))
    assert {"python", "system", "cores", "torch", "onnxruntime", "vqdeploy"} <= set(facts)


def test_export_and_build_json(vqdeploy, artifacts, tmp_path):
    tokenizer = artifacts.checkpoint(create(replace(SMALL, prior=None)))
    result = parsed(vqdeploy("export", "--checkpoint", tokenizer, "--json"))
    assert result["package"] == "rqvae-onnx"
    assert result["verify"]["passed"] is True
    result = parsed(vqdeploy("build", "--json", "--max-batch", 4))
    assert (result["plan"], result["backend"]) == ("rqvae.plan", "onnxrt")
    assert result["bytes"] == (tmp_path / "rqvae.plan").stat().st_size
    assert names(tmp_path) == ["rqvae-onnx", "rqvae.plan"]


def test_verify_json(vqdeploy, plan, checkpoint_folder):
    report = parsed(vqdeploy("verify", "--engine", plan, "--checkpoint", checkpoint_folder, "--json"))
    assert report["passed"] is True
    assert {"stage", "metric", "value", "limit", "passed"} == set(report["checks"][0])


def test_the_weights_of_the_losses_reach_the_training(vqdeploy, monkeypatch):
    asked = {}
    monkeypatch.setattr("vqdeploy.training.train", lambda **options: asked.update(options) or {})
    weights = {"perceptual_weight": 0.5, "adversarial_weight": 0.25, "logit_laplace_weight": 0.125}
    options = [part for name, value in weights.items() for part in ("--" + name.replace("_", "-"), value)]
    assert parsed(vqdeploy("train", *options, "--json")) == {"checkpoint": "rqvae-tiny"}
    assert weights.items() <= asked.items()


def test_inspect_json(vqdeploy, plan):
    result = parsed(vqdeploy("inspect", plan, "--json"))
    assert result["format"] == 1
    assert result["extracted"] == []
    assert set(result["sizes"]) == {"manifest.json", *result["members"]}


def test_inspect_extract(vqdeploy, plan, tmp_path):
    result = parsed(vqdeploy("inspect", plan, "--extract", "out", "--json"))
    assert names(tmp_path / "out") == sorted(result["members"])
    assert sorted(result["extracted"]) == sorted(f"out/{name}" for name in result["members"])


@pytest.mark.parametrize("task", ["generate", "reconstruct", "inpaint", "encode"])
def test_run_json(vqdeploy, plan, picture, task, tmp_path):
    options = ["--input", picture] if task != "generate" else []
    options += ["--label", "dog"] if task in ("generate", "inpaint") else []
    result = parsed(vqdeploy("run", "--engine", plan, "--task", task, *options, "--json"))
    assert result["task"] == task
    assert result["output"] == f"rqvae-{task}.{'npz' if task == 'encode' else 'png'}"
    assert result["seconds"] > 0
    assert names(tmp_path) == ["in.png", result["output"]]


def test_inspect_tells_the_stages(vqdeploy, plan):
    code, out, _ = vqdeploy("inspect", plan)
    assert code == 0
    for word in ("rqvae small fp32 for onnxrt", "stage encode", "stage step", "past_key.0", "weights.safetensors"):
        assert word in out


# Running


def test_the_same_request_gives_the_same_file(vqdeploy, plan, tmp_path):
    for name in ("a.png", "b.png"):
        assert vqdeploy("run", "--engine", plan, "--label", "cat", "--num-images", 2, "--seed", 5, "-o", name)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    vqdeploy("run", "--engine", plan, "--label", "cat", "--num-images", 2, "--seed", 6, "-o", "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_the_options_are_in_the_file(vqdeploy, plan, pipeline, tmp_path):
    options = ["--temperature", "0.7", "--top-k", "1,2,3,4", "--top-p", "0.5", "--seed", "3"]
    vqdeploy("run", "--engine", plan, "--label", "eel", "--label", "0", "--num-images", 2, *options)
    with Image.open(tmp_path / "rqvae-generate.png") as image:
        note = json.loads(image.text["vqdeploy"])
        pixels = np.asarray(image)
    assert note == {
        "system": "rqvae",
        "checkpoint": pipeline.manifest.provenance.checkpoint,
        "options": {"seed": 3, "labels": [2, 2, 0, 0], "temperature": 0.7, "top_k": [1, 2, 3, 4], "top_p": 0.5},
    }
    expected = pipeline.generate([2, 2, 0, 0], seed=3, temperature=0.7, top_k=[1, 2, 3, 4], top_p=0.5).images
    for i, image in enumerate(expected):
        top, left = i // 2 * 18, i % 2 * 18
        np.testing.assert_array_equal(pixels[top : top + 16, left : left + 16], image)


def test_without_labels_every_class_has_a_row(vqdeploy, plan, tmp_path):
    result = parsed(vqdeploy("run", "--engine", plan, "--num-images", 2, "--json"))
    assert result["options"]["labels"] == [0, 0, 1, 1, 2, 2]


def test_codes_go_to_a_file_and_back(vqdeploy, plan, pipeline, picture, tmp_path):
    assert vqdeploy("run", "--engine", plan, "--task", "encode", "--input", picture, "-o", "codes.npz")[0] == 0
    archive = np.load(tmp_path / "codes.npz", allow_pickle=False)
    codes = archive["codes"]
    assert archive["files"].tolist() == [str(picture)]
    assert (codes.shape, codes.dtype) == ((1, 4, 4, 4), np.int64)
    vqdeploy("run", "--engine", plan, "--task", "decode", "--input", "codes.npz", "--columns", 1, "-o", "d.png")
    vqdeploy("run", "--engine", plan, "--task", "reconstruct", "--input", picture, "-o", "r.png")
    decoded, both = (np.asarray(Image.open(tmp_path / name)) for name in ("d.png", "r.png"))
    np.testing.assert_array_equal(decoded, pipeline.decode(codes)[0])
    np.testing.assert_array_equal(both[18:], decoded)


def test_depth_is_passed_on(vqdeploy, plan, pipeline, tmp_path):
    codes = np.random.default_rng(0).integers(0, 64, (1, 4, 4, 4))
    np.savez(tmp_path / "c.npz", codes=codes)
    arguments = ["--task", "decode", "--input", "c.npz", "--columns", 1, "--depth", 2, "-o", "d.png"]
    assert vqdeploy("run", "--engine", plan, *arguments)[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "d.png")), pipeline.decode(codes, 2)[0])


def test_a_folder_of_images(vqdeploy, plan, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "._0.png").write_text("not an image")
    (tmp_path / "images" / "paper.pdf").write_text("not an image")
    run = ("run", "--engine", plan, "--task", "reconstruct", "--input", "images", "--json")
    assert parsed(vqdeploy(*run))["images"] == 6
    (tmp_path / "images" / "3.png").write_text("not an image")
    refused(vqdeploy(*run), 1, "3.png is not an image that can be read (")


def test_a_folder_of_folders(vqdeploy, plan, tmp_path):
    for name in ("cat/images/0.png", "dog/1.png", ".cache/2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "in" / name)
    run = ("run", "--engine", plan, "--task", "encode", "--input", "in", "-o", "codes.npz", "--json")
    assert parsed(vqdeploy(*run))["shape"] == [2, 4, 4, 4]
    assert np.load(tmp_path / "codes.npz")["files"].tolist() == ["in/cat/images/0.png", "in/dog/1.png"]
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "loose.png")
    refused(vqdeploy(*run), 2, "in holds images beside folders of images: loose.png beside cat, dog")


def test_a_mask_of_its_own(vqdeploy, plan, picture, pipeline, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[12:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["--task", "inpaint", "--input", picture, "--mask", "mask.png", "--label", "1", "-o", "i.png"]
    assert vqdeploy("run", "--engine", plan, *arguments)[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "i.png"))
    original = sheet[None, 36:]
    expected = pipeline.inpaint(original, [1], mask=mask > 127).images[0]
    np.testing.assert_array_equal(sheet[18:34], expected)
    np.testing.assert_array_equal(sheet[:16], np.where(mask[..., None] > 127, 128, original[0]))


def test_the_sheet_shows_what_was_drawn_and_not_what_the_mask_covers(vqdeploy, plan, movq_plan, picture, tmp_path):
    """One corner at the top: an autoregressive prior draws everything from its row on, a masked one nothing else."""
    mask = np.zeros((16, 16), np.uint8)
    mask[5:7, :4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["--task", "inpaint", "--input", picture, "--mask", "mask.png", "--label", "1", "-o", "i.png"]
    for file, unknown in ((plan, np.arange(16)[:, None] >= 4), (movq_plan, mask > 127)):
        assert vqdeploy("run", "--engine", file, *arguments)[0] == 0
        sheet = np.asarray(Image.open(tmp_path / "i.png"))
        shown, drawn, original = sheet[:16], sheet[18:34], sheet[36:]
        np.testing.assert_array_equal(shown, np.where(unknown[..., None], 128, original))
        if file is movq_plan:
            np.testing.assert_array_equal(
                np.where(unknown[..., None], 0, drawn), np.where(unknown[..., None], 0, original)
            )


def test_a_masked_prior_completes_one_image_several_times(vqdeploy, movq_plan, movq_pipeline, picture, tmp_path):
    arguments = ["--task", "inpaint", "--input", picture, "--mask-ratio", 0.9, "--steps", 3, "--completions", 2]
    assert vqdeploy("run", "--engine", movq_plan, *arguments, "--seed", 4, "-o", "i.png")[0] == 0
    rows = np.asarray(Image.open(tmp_path / "i.png")).reshape(-1, 16, 3)
    masked, first, second, original = (rows[i * 18 : i * 18 + 16] for i in range(4))
    expected = movq_pipeline.inpaint(original[None], mask_ratio=0.9, steps=3, completions=2, seed=4).images
    np.testing.assert_array_equal([first, second], expected)
    unknown = movq_pipeline.unknown(1, mask_ratio=0.9, seed=4)
    np.testing.assert_array_equal(masked, veil(original[None], unknown)[0])


@pytest.mark.parametrize("name", ["steps.png", "steps.gif"])
def test_a_film_shows_every_step_of_the_first_image(vqdeploy, movq_plan, movq_pipeline, name, tmp_path):
    options = {"seed": 2, "steps": 5, "guidance_scale": 1.5}
    arguments = ["--label", "dog", "--steps", 5, "--seed", 2, "--guidance-scale", 1.5, "--film", name]
    assert vqdeploy("run", "--engine", movq_plan, *arguments)[0] == 0
    last = movq_pipeline.generate([1], **options).images[0]
    with Image.open(tmp_path / name) as film:
        if name.endswith("gif"):
            assert film.n_frames == 5
            film.seek(4)
            shown = np.asarray(film.convert("RGB"))
            assert np.abs(shown.astype(int) - last).mean() < 12  # a palette of 256 colours
        else:
            assert film.size == (5 * 18 - 2, 16)
            np.testing.assert_array_equal(np.asarray(film)[:, -16:], last)


def test_a_film_of_blended_vectors_ends_with_the_image(vqdeploy, var_plan, var_pipeline, tmp_path):
    """They are no codes, which a film shows before."""
    arguments = ["--label", "dog", "--seed", 2, "--more-smooth", 1, "--film", "scales.png"]
    assert vqdeploy("run", "--engine", var_plan, *arguments)[0] == 0
    last = var_pipeline.generate([1], seed=2, more_smooth=1).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "scales.png"))[:, -16:], last)


@pytest.mark.parametrize("film", ["a.png", ".", "f.jpg", "film"])
def test_films_that_cannot_be_are_refused_before_the_work(vqdeploy, movq_plan, film, tmp_path):
    arguments = ["--label", "dog", "--film", film, "-o", "a.png"]
    refused(vqdeploy("run", "--engine", movq_plan, *arguments), 2, "film")
    assert names(tmp_path) == []


def test_a_mask_is_judged_by_its_lightness(tmp_path):
    """Transparent is black, whatever colour lies under it."""
    pixels = np.zeros((1, 5, 4), np.uint8)
    pixels[0] = [[255, 255, 255, 255], [255, 255, 255, 0], [0, 255, 0, 255], [0, 0, 255, 255], [0, 0, 0, 255]]
    Image.fromarray(np.repeat(pixels, 5, 0)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 5)[0], [True, False, True, False, False])


def test_a_film_of_an_autoregressive_prior(vqdeploy, plan, tmp_path):
    assert vqdeploy("run", "--engine", plan, "--label", "dog", "--num-images", 1, "--film", "f.png")[0] == 0
    sheet, film = (np.asarray(Image.open(tmp_path / name)) for name in ("rqvae-generate.png", "f.png"))
    np.testing.assert_array_equal(film[:, -16:], sheet)
    assert film.shape == (16, 16 * 18 - 2, 3)


@pytest.mark.parametrize(("options", "shape"), [([], (2, 4, 64)), (["--layer", 2], (2, 64))])
def test_features_go_to_an_archive(vqdeploy, vit_plan, vit_pipeline, picture, options, shape, tmp_path):
    arguments = ["--task", "features", "--input", picture, "--input", picture, *options]
    result = parsed(vqdeploy("run", "--engine", vit_plan, *arguments, "--json"))
    assert (result["output"], result["shape"]) == ("vitvqgan-features.npz", list(shape))
    archive = np.load(tmp_path / "vitvqgan-features.npz", allow_pickle=False)
    features = archive["features"]
    assert archive["files"].tolist() == [str(picture)] * 2
    expected = vit_pipeline.features(read(picture, 16)[None])
    np.testing.assert_allclose(features[0], expected[0, 2] if options else expected[0], rtol=1e-4, atol=1e-5)


# A hierarchy of levels


def sheet_of(path, side=24):
    """The images of a grid of one column, and the note in its file."""
    with Image.open(path) as image:
        pixels, note = np.asarray(image), json.loads(image.text["vqdeploy"])
    assert pixels.shape[1] == side
    return [pixels[top : top + side] for top in range(0, len(pixels), side + 2)], note


def test_a_hierarchy_generates(vqdeploy, vqvae2_plan, vqvae2_pipeline, tmp_path):
    options = ["--label", "dog", "--label", "2", "--num-images", 1, "--temperature", "0,0.8", "--top-k", 9, "--seed", 3]
    result = parsed(vqdeploy("run", "--engine", vqvae2_plan, *options, "--film", "f.png", "--json"))
    assert (result["output"], result["film"]) == ("vqvae2-generate.png", "f.png")
    found, note = sheet_of(tmp_path / "vqvae2-generate.png")
    expected = vqvae2_pipeline.generate([1, 2], seed=3, temperature=[0, 0.8], top_k=9)
    np.testing.assert_array_equal(found, expected.images)
    assert note == {
        "system": "vqvae2",
        "checkpoint": vqvae2_pipeline.manifest.provenance.checkpoint,
        "options": {"seed": 3, "labels": [1, 2], "temperature": [0, 0.8], "top_k": 9, "top_p": 1.0},
    }
    film = np.asarray(Image.open(tmp_path / "f.png"))
    assert film.shape == (24, 45 * 26 - 2, 3)  # a frame for each code of both levels
    np.testing.assert_array_equal(film[:, -24:], found[0])
    grey = np.abs(film[:, : 9 * 26].astype(int) - 128).mean()
    assert grey < np.abs(film[:, -26 * 9 :].astype(int) - 128).mean()  # a veil lies over what has no bottom code yet


@pytest.mark.parametrize(("options", "kept"), [([], 1), (["--keep-levels", 0], 0), (["--keep-levels", 1], 1)])
def test_details_are_drawn_anew(vqdeploy, vqvae2_plan, vqvae2_pipeline, picture, tmp_path, options, kept):
    arguments = ["--task", "resample", "--input", picture, "--label", "eel", "--completions", 2, "--seed", 4, *options]
    result = parsed(vqdeploy("run", "--engine", vqvae2_plan, *arguments, "--json"))
    (original, *drawn), note = sheet_of(tmp_path / "vqvae2-resample.png")
    np.testing.assert_array_equal(original, read(picture, 24))
    expected = vqvae2_pipeline.resample(original[None], [2], keep=kept, completions=2, seed=4)
    np.testing.assert_array_equal(drawn, expected.images)
    assert result["images"] == 3
    assert note["kept_levels"] == result["kept_levels"] == kept
    assert note["options"]["labels"] == [2, 2]
    assert "timings" not in note


def test_a_hierarchy_completes_an_image(vqdeploy, vqvae2_plan, vqvae2_pipeline, picture, tmp_path):
    arguments = ["--task", "inpaint", "--input", picture, "--label", "cat", "--mask-ratio", 0.5, "--seed", 4]
    assert vqdeploy("run", "--engine", vqvae2_plan, *arguments)[0] == 0
    (masked, drawn, original), note = sheet_of(tmp_path / "vqvae2-inpaint.png")
    expected = vqvae2_pipeline.inpaint(original[None], [0], mask_ratio=0.5, seed=4).images[0]
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(masked[:8], original[:8])  # two of three rows at the top, three of six at the bottom
    assert (masked[8:] == 128).all()
    assert note["mask_ratio"] == 0.5


def test_maps_that_are_summed_show_the_sum_of_what_is_known(vqdeploy, artifacts, picture, tmp_path):
    """Half of the codes of all maps are known, though hardly a pixel has none to draw."""
    arguments = ["--task", "inpaint", "--input", picture, "--label", "1", "--mask-ratio", 0.5, "--seed", 4]
    assert vqdeploy("run", "--engine", artifacts.plan("var"), *arguments)[0] == 0
    pipeline = artifacts.pipeline("var")
    (masked, drawn, original), _ = sheet_of(tmp_path / "var-inpaint.png", pipeline.image_shape[0])
    result = pipeline.inpaint(original[None], [1], mask_ratio=0.5, seed=4)
    np.testing.assert_array_equal(drawn, result.images[0])
    unknown = pipeline.unknown(1, mask_ratio=0.5, seed=4)
    assert unknown.sum() == unknown.size // 2
    np.testing.assert_array_equal(masked, pipeline.preview(np.where(unknown, -1, result.codes))[0])


def test_the_codes_of_a_hierarchy_go_to_a_file_and_back(vqdeploy, vqvae2_plan, vqvae2_pipeline, picture, tmp_path):
    run = ("run", "--engine", vqvae2_plan, "--task")
    assert parsed(vqdeploy(*run, "encode", "--input", picture, "-o", "codes.npz", "--json"))["shape"] == [1, 45]
    codes = np.load(tmp_path / "codes.npz")["codes"]
    assert vqdeploy(*run, "decode", "--input", "codes.npz", "--columns", 1, "-o", "d.png")[0] == 0
    assert vqdeploy(*run, "reconstruct", "--input", picture, "-o", "r.png")[0] == 0
    (decoded,), note = sheet_of(tmp_path / "d.png")
    np.testing.assert_array_equal(decoded, vqvae2_pipeline.decode(codes)[0])
    np.testing.assert_array_equal(sheet_of(tmp_path / "r.png")[0][1], decoded)
    assert set(note) == {"system", "checkpoint"}


def test_a_hierarchy_without_labels_has_one_row(vqdeploy, three_plan, picture, tmp_path):
    result = parsed(vqdeploy("run", "--engine", three_plan, "--num-images", 2, "--json"))
    assert result["options"]["labels"] == [0, 0]
    result = parsed(vqdeploy("run", "--engine", three_plan, "--task", "resample", "--input", picture, "--json"))
    assert (result["images"], result["kept_levels"]) == (2, 1)


def test_a_plan_of_a_hierarchy_verifies_and_tells_its_stages(vqdeploy, vqvae2_plan, vqvae2_checkpoint):
    arguments = ("verify", "--engine", vqvae2_plan, "--checkpoint", vqvae2_checkpoint, "--json")
    assert parsed(vqdeploy(*arguments))["passed"] is True
    out = vqdeploy("inspect", vqvae2_plan)[1]
    for stage in ("encode", "decode", "top_row", "top_pixel", "bottom_condition", "bottom_row", "bottom_pixel"):
        assert f"stage {stage}" in out


# What is refused, in one sentence


def refused(result, code, *words):
    found, out, err = result
    assert found == code, err
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "paint"], ["no such task", "inpaint"]),
        (["--label", "unicorn"], ["no such label", "cat, dog, eel", "unicorn"]),
        (["--label", "3"], ["no such label"]),
        (["--temperature", "hot"], ["--temperature is malformed; expected comma-separated numbers", "hot"]),
        (["--temperature", "inf"], ["a finite number of 0 or more, found inf"]),
        (["--temperature", "1,2"], ["one value or 4"]),
        (["--temperature", "nan"], ["temperature is out of range"]),
        (["--top-k", "1.5"], ["comma-separated integers"]),
        (["--top-k", "65"], ["0..64"]),
        (["--top-p", "2"], ["top_p is out of range"]),
        (["--seed", str(10**30)], ["seed is out of range"]),
        (["--task", "encode"], ["needs images", "--input"]),
        (["--task", "encode", "--input", "none.png"], ["none.png does not exist"]),
        (["--task", "decode"], ["one file of codes"]),
        (["--task", "decode", "--input", "none.npz"], ["none.npz does not exist"]),
        (["--task", "inpaint", "--input", "in.png", "--label", "cat", "--mask-ratio", "1.5"], ["mask ratio"]),
        (["--task", "inpaint", "--input", "in.png"], ["needs labels"]),
        (["--task", "inpaint", "--input", "in.png", "--label", "cat", "--mask", "none.png"], ["none.png"]),
        (["--task", "reconstruct", "--input", "in.png", "--depth", "5"], ["no such depth", "1..4"]),
        (["--task", "features", "--input", "in.png"], ["this plan has no features"]),
        (["--steps", "3"], ["this system has no option steps", "temperature, top_k, top_p"]),
        (
            ["--task", "reconstruct", "--film", "f.gif"],
            ["--film is not an option of this task; expected --task generate"],
        ),
        (["--layer", "1"], ["--layer", "expected --task features, found generate"]),
        (["--depth", "1"], ["--depth", "--task reconstruct or decode"]),
        (["--input", "in.png"], ["--input", "found generate"]),
        (["--mask", "in.png"], ["--mask is", "--task inpaint"]),
        (["--mask-ratio", "0.5"], ["--mask-ratio", "--task inpaint"]),
        (["--task", "encode", "--input", "in.png", "--label", "cat"], ["--label", "found encode"]),
        (["--task", "encode", "--input", "in.png", "--num-images", "2"], ["--num-images", "found encode."]),
        (["--task", "encode", "--input", "in.png", "--seed", "0"], ["--seed", "generate or inpaint", "found encode"]),
        (
            ["--task", "inpaint", "--input", "in.png", "--num-images", "2"],
            ["--num-images", "expected --task generate, found inpaint. Fix: --completions 2"],
        ),
        (["--completions", "2"], ["--completions", "expected --task inpaint or resample, found generate"]),
        (["--text-features", "in.png"], ["--text-features does not fit this prior; expected --label"]),
        (["--task", "encode", "--text-features", "in.png"], ["--text-features is not", "--task generate or inpaint"]),
        (["--task", "decode", "--top-k", "5"], ["--top-k", "expected --task generate or inpaint or resample"]),
        (["--task", "encode", "--input", "in.png", "-o", "codes.png"], ["encode writes a .npz file", "codes.png"]),
        (["-o", "gen.npz"], ["generate writes a .png file; expected -o FILE.png, found gen.npz"]),
        (["-o", "gen.jpg"], ["generate writes a .png file"]),
        (["-o", "in.png/out.png"], ["in.png/out.png cannot be written", "-o"]),
        (["-o", "."], ["cannot be written"]),
    ],
)
def test_wrong_requests(vqdeploy, plan, picture, tmp_path, arguments, words):
    refused(vqdeploy("run", "--engine", plan, *arguments), 2, *words)
    assert names(tmp_path) == ["in.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["steps is out of range", "1..10000"]),
        (["--schedule", "sine"], ["no such schedule", "cosine", "sine"]),
        (["--guidance-scale", "nan"], ["guidance_scale is out of range"]),
        (["--choice-temperature", "-1"], ["choice_temperature is out of range"]),
        (["--task", "decode", "--input", "codes.npz", "--depth", "2"], ["no depths to leave out"]),
        (["--task", "inpaint", "--input", "in.png", "--mask-ratio", "2"], ["mask ratio is out of range"]),
    ],
)
def test_wrong_requests_to_a_masked_prior(vqdeploy, movq_plan, picture, tmp_path, arguments, words):
    np.savez(tmp_path / "codes.npz", codes=np.zeros((1, 4, 4, 4), int))
    refused(vqdeploy("run", "--engine", movq_plan, *arguments), 2, *words)
    assert names(tmp_path) == ["codes.npz", "in.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "resample", "--input", "in.png"], ["needs labels", "0..2"]),
        (["--task", "resample", "--label", "cat"], ["needs images"]),
        (
            ["--task", "resample", "--input", "in.png", "--label", "cat", "--keep-levels", "2"],
            ["levels to keep", "0..1"],
        ),
        (
            ["--task", "resample", "--input", "in.png", "--label", "cat", "--keep-levels", "-1"],
            ["levels to keep", "0..1"],
        ),
        (["--task", "resample", "--input", "in.png", "--label", "cat", "--film", "f.gif"], ["--film is not an option"]),
        (["--task", "reconstruct", "--input", "in.png", "--depth", "1"], ["no depths to leave out"]),
        (["--task", "decode", "--input", "codes.npz"], ["codes", "[B, 45]"]),
        (["--temperature", "1,1,1"], ["one value or 2"]),
        (["--guidance-scale", "2"], ["no option guidance_scale"]),
        (["--task", "features", "--input", "in.png"], ["no features"]),
    ],
)
def test_wrong_requests_to_a_hierarchy(vqdeploy, vqvae2_plan, picture, tmp_path, arguments, words):
    np.savez(tmp_path / "codes.npz", codes=np.zeros((1, 4, 4, 4), int))
    refused(vqdeploy("run", "--engine", vqvae2_plan, *arguments), 2, *words)
    assert names(tmp_path) == ["codes.npz", "in.png"]


def test_codes_of_one_level_are_not_resampled(vqdeploy, plan, picture):
    arguments = ["--task", "resample", "--input", picture, "--label", "cat"]
    refused(vqdeploy("run", "--engine", plan, *arguments), 2, "one level", "expected two or more")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--engine"],
        ["paint"],
        ["run", "--engine", "a.plan", "--num-images", "0"],
        ["run", "--engine", "a.plan", "--seed", "-1"],
        ["run", "--engine", "a.plan", "--seed", "x"],
        ["export", "--opset", "new"],
        ["export", "--unknown"],
    ],
)
def test_wrong_usage(vqdeploy, arguments):
    code, out, err = vqdeploy(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage" in err or "Error: Option" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--model", "rqvea"], ["there is no model 'rqvea'", "rqvae"]),
        (["export", "--preset", "huge"], ["no preset 'huge'", "vqdeploy models"]),
        (["export", "--checkpoint", "none"], ["none is not a checkpoint folder"]),
        (["export", "--dtype", "fp64"], ["unsupported precision"]),
        (["export", "--opset", "17"], ["24..25, found 17"]),
        (["export", "--image-size", "9" * 5000], ["--image-size is malformed"]),
        (["train", "--seed", 2**32], ["error: seed is out of range"]),
        (["train", "--steps", 10**18], ["error: steps is out of range"]),
        (["train", "--data", ""], ["there is no such data", "found no name"]),
        (["export", "-o", "file/onnx"], ["file/onnx cannot be written"]),
        (["export", "-o", "."], ["holds something else"]),
        (["build"], ["rqvae-onnx is not an ONNX package", "vqdeploy export"]),
        (["build", "file"], ["file is not an ONNX package"]),
        (["run", "--engine", "none.plan"], ["none.plan does not exist"]),
        (["run", "--engine", "."], ["cannot be read"]),
        (["verify", "--engine", "none.plan"], ["none.plan does not exist"]),
        (["inspect", "none.plan"], ["none.plan does not exist"]),
        (["inspect", "."], ["cannot be read"]),
    ],
)
def test_wrong_paths_and_names(vqdeploy, tmp_path, arguments, words):
    (tmp_path / "file").write_text("x")
    refused(vqdeploy(*arguments), 2, *words)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("verb", ["run --engine", "verify --engine", "inspect"])
@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), b"PK\x03\x04" + bytes(200)])
def test_files_that_are_no_plan(vqdeploy, tmp_path, verb, content):
    (tmp_path / "a.plan").write_bytes(content)
    refused(vqdeploy(*verb.split(), "a.plan"), 1, "a.plan is not a plan, or is damaged")


def test_batch_sizes_out_of_order(vqdeploy, package):
    refused(
        vqdeploy("build", package, "--backend", "tensorrt", "--opt-batch", 4, "--max-batch", 2),
        2,
        "not ascending",
        "1, 4, 2",
    )


def test_devices(vqdeploy, plan, package):
    for verb in (["run", "--label", "cat"], ["verify"], ["bench"]):
        refused(vqdeploy(*verb, "--engine", plan, "--device", "cuda"), 2, "was built for the CPU", "--device cuda")
        refused(vqdeploy(*verb, "--engine", plan, "--device", "tpu"), 2, "expected auto, cpu or cuda, found tpu")
    assert vqdeploy("build", package, "--device", "cuda", "-o", "cuda.plan")[0] == 0
    assert " for onnxrt on cuda\n" in vqdeploy("inspect", "cuda.plan")[1]
    refused(vqdeploy("run", "--engine", "cuda.plan", "--device", "cuda"), 2, "no CUDA", "onnxruntime-gpu[cuda,cudnn]")


def test_a_read_only_place(vqdeploy, plan, package):
    """/proc refuses new files even from root."""
    for arguments in (["run", "--engine", plan, "--label", "cat"], ["build", package], ["export"]):
        refused(vqdeploy(*arguments, "-o", "/proc/none/out"), 2, "/proc/none/out cannot be written", "-o")
    refused(vqdeploy("inspect", plan, "--extract", "/proc/none"), 2, "/proc/none cannot be written")


def test_a_changed_package(vqdeploy, package, tmp_path):
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes() + b"\0")
    refused(vqdeploy("build", "copy"), 1, "was changed after it was exported")
    assert names(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x05\x06" + bytes(18), pickle.dumps({"codes": [1]}), b"\x93NUMPY\x01\x00"]
)
def test_damaged_codes(vqdeploy, plan, tmp_path, content):
    (tmp_path / "codes.npz").write_bytes(content)
    refused(vqdeploy("run", "--engine", plan, "--task", "decode", "--input", "codes.npz"), 1, "not a file of codes")


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((1, 4, 4, 3), int), 2),
        (np.full((1, 4, 4, 4), 64), 2),
        (np.zeros((1, 4, 4, 4)), 2),
        (np.array([{"a": 1}], dtype=object), 1),
    ],
)
def test_codes_that_do_not_fit(vqdeploy, plan, tmp_path, array, code):
    np.savez(tmp_path / "codes.npz", codes=array)
    refused(vqdeploy("run", "--engine", plan, "--task", "decode", "--input", "codes.npz"), code, "codes")


def test_codes_that_unpack_to_more_than_any_memory(vqdeploy, plan, tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "codes.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("codes.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**30 // 8 // 64 + 1, 4, 4, 4)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(65):
            member.write(bytes(2**24))
    refused(vqdeploy("run", "--engine", plan, "--task", "decode", "--input", "codes.npz"), 1, "not a file of codes")


def test_codes_under_another_name(vqdeploy, plan, tmp_path):
    np.savez(tmp_path / "codes.npz", tokens=np.zeros((1, 4, 4, 4), int))
    refused(vqdeploy("run", "--engine", plan, "--task", "decode", "--input", "codes.npz"), 1, "not a file of codes")


def huge_png():
    """A header that promises ten gigapixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "flipped", "huge"])
def test_damaged_images(vqdeploy, plan, picture, tmp_path, kind):
    good = picture.read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello",
        "truncated": good[:1000],
        "flipped": good[:60] + bytes(byte ^ 255 for byte in good[60:90]) + good[90:],
        "huge": huge_png(),
    }
    (tmp_path / "bad").write_bytes(contents[kind])
    refused(vqdeploy("run", "--engine", plan, "--task", "encode", "--input", "bad"), 1, "bad", "not an image")


def test_a_folder_gives_its_images_alone(vqdeploy, plan, picture, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("not an image")
    request = ("run", "--engine", plan, "--task", "encode", "--input", "folder", "--json")
    refused(vqdeploy(*request), 2, "folder holds no images; expected files such as")
    (folder / "a.png").write_bytes(picture.read_bytes())
    assert json.loads(vqdeploy(*request)[1])["shape"][0] == 1


def test_tracebacks_only_when_asked_for(command, tmp_path):
    quiet = command("inspect", "none.plan", cwd=tmp_path)
    loud = command("-vv", "inspect", "none.plan", cwd=tmp_path)
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr


# Exit codes of the real script


def test_exit_codes(command, plan, tmp_path):
    (tmp_path / "bad.plan").write_bytes(plan.read_bytes()[:-1])
    assert command("inspect", plan).returncode == 0
    assert command("inspect", tmp_path / "bad.plan").returncode == 1
    assert command("inspect", tmp_path / "none.plan").returncode == 2
    assert command("paint").returncode == 2


def test_a_failed_check_exits_with_1(vqdeploy, plan, checkpoint_folder, monkeypatch):
    exact = replace(PRECISIONS["fp32"].limits, logits=0.0)
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], limits=exact))
    code, out, _ = vqdeploy("verify", "--engine", plan, "--checkpoint", checkpoint_folder, "--json")
    assert code == 1
    report = json.loads(out)
    assert report["passed"] is False
    assert {c["stage"] for c in report["checks"] if not c["passed"]} == {"step"}


def test_an_export_that_fails_its_checks_exits_with_1(vqdeploy, checkpoint_folder, package, monkeypatch):
    monkeypatch.setattr("vqdeploy.export.package.export", lambda system, folder, *_: shutil.copytree(package, folder))
    exact = replace(PRECISIONS["fp32"].limits, logits=0.0)
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], limits=exact))
    code, out, err = vqdeploy("export", "--checkpoint", checkpoint_folder, "--json")
    assert code == 1
    assert json.loads(out)["verify"]["passed"] is False
    assert "FAILED" in err


def test_python_m_vqdeploy(python):
    script = (
        "import runpy, sys; sys.argv = ['vqdeploy', '--version']; runpy.run_module('vqdeploy', run_name='__main__')"
    )
    assert python(script).strip().count(".") == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(vqdeploy, verb):
    code, out, _ = vqdeploy(verb, "--help")
    assert code == 0
    assert "--json" in out


def interrupt(command, cwd, arguments, sign):
    """Sends Ctrl-C as soon as `sign` appears on stderr."""
    with subprocess.Popen(  # noqa: S603
        [command.script, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stderr:
            if sign in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        return process.wait(60), rest


def test_an_interrupted_export_leaves_nothing(command, tmp_path, checkpoint_folder):
    arguments = ["export", "--checkpoint", checkpoint_folder, "-o", tmp_path / "onnx"]
    code, err = interrupt(command, tmp_path, arguments, "exporting encode")
    assert code == 130, err
    assert "Traceback" not in err
    assert names(tmp_path) == []


def test_an_interrupted_build_leaves_nothing(command, tmp_path, tiny):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed, and other builds are over too soon")
    arguments = ["build", tiny.package, "--backend", "tensorrt-rtx", "-o", tmp_path / "a.plan"]
    code, err = interrupt(command, tmp_path, arguments, "building encode")
    assert code == 130, err
    assert "Traceback" not in err
    assert names(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(vqdeploy, plan, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.Image.Image.save", stop)
    code, out, _ = vqdeploy("run", "--engine", plan, "--label", "cat", "--num-images", 1)
    assert (code, out) == (130, "")
    assert names(tmp_path) == []


def test_the_plan_of_the_shipped_preset_generates_its_labels(tiny):
    pipeline = load(tiny.plan)
    assert [pipeline.label(str(digit)) for digit in range(10)] == list(range(10))
