"""A prior is trained on a folder of codes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.data import CLASSES, png, write_tar

from vqdeploy import checkpoint, shards
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.pixels import channels_first, to_range
from vqdeploy.runtime.images import read
from vqdeploy.systems import SYSTEMS, Recipe
from vqdeploy.tokenize import run, tokenize
from vqdeploy.tokenize.part import tokenize_part
from vqdeploy.training import train
from vqdeploy.training.data import open_data

SHORT = {"prior_steps": 3, "batch_size": 4, "samples": 10}


@pytest.fixture(scope="module")
def codes_of(artifacts, tmp_path_factory):
    """Makes the codes of 30 images in two classes with a plan of a small system."""

    def make(system):
        folder = tmp_path_factory.mktemp(system)
        for i in range(30):
            path = folder / "in" / CLASSES[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_locally", lambda job, parts, workers: (tokenize_part(job, p, 1) for p in parts))
            tokenize(artifacts.plan(system), str(folder / "in"), folder / "codes", shard_size=8)
        return folder / "codes"

    return make


@pytest.fixture(scope="module")
def codes(codes_of):
    return codes_of("rqvae")


@pytest.fixture
def small(artifacts, monkeypatch):
    """Presets are the configurations of the small systems."""
    monkeypatch.setattr("vqdeploy.training.run.find_preset", lambda model, _: artifacts.system(model).config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rqvae", "vqvae2"])
def test_a_prior_is_trained_and_the_tokenizer_stays(artifacts, codes_of, small, tmp_path, name):
    tokenizer = artifacts.checkpoint(name)
    folder = codes_of(name)
    report = train(name, data=str(folder), output=tmp_path / "out", tokenizer=tokenizer, **SHORT)
    system, kept = checkpoint.load(tmp_path / "out"), checkpoint.load(tokenizer)
    for key, weight in kept.tokenizer.state_dict().items():
        assert torch.equal(system.tokenizer.state_dict()[key], weight), key
    assert (system.config.labels, system.config.prior.classes) == (CLASSES, 2)
    assert set(report["seconds"]) == {"prior"}
    assert set(report["metrics"]) == {"usage", "perplexity", "samples"}
    side = system.config.tokenizer.resolution
    assert Image.open(tmp_path / "out" / "reconstructions.png").size == (2 * (side + 2) - 2, side)


def test_codes_are_those_of_the_tokenizer(artifacts, codes):
    """The same images and classes, a tenth of each class held out."""
    data = open_data(str(codes), 16)
    assert (len(data.train), len(data.held_out), data.labels) == (28, 2, CLASSES)
    assert [label for _, label in (data.held_out[i] for i in range(2))] == [0, 1]
    tokenizer = artifacts.system("rqvae").tokenizer
    found = {
        (item.numpy().tobytes(), label)
        for part in (data.train, data.held_out)
        for item, label in map(part.item, range(len(part)))
    }
    wanted = set()
    for i in range(30):
        image = torch.from_numpy(read(codes.parent / "in" / CLASSES[i % 2] / f"{i:02}.png", 16).copy())
        encoded = tokenizer.encode(to_range(channels_first(image[None]), tokenizer.config.pixel_range))[0]
        wanted.add((encoded.numpy().tobytes(), i % 2))
    assert found == wanted


@pytest.mark.parametrize("name", ["rqvae", "movq", "vqgan", "vqvae2"])
def test_the_loss_of_codes_is_that_of_their_images(artifacts, name):
    system, loss = artifacts.system(name), SYSTEMS[name].loss
    generator = torch.Generator().manual_seed(0)
    side = system.config.tokenizer.resolution
    x = to_range(
        torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator),
        system.config.tokenizer.pixel_range,
    )
    recipe = Recipe(soft_temperature=1e-8)  # soft targets become hard
    losses = []
    for batch in (x, system.tokenizer.encode(x)):
        torch.manual_seed(0)
        losses.append(loss(system, batch, torch.tensor([0, 1, 2]), recipe, False))
    torch.testing.assert_close(*losses)


def test_codes_need_their_tokenizer(artifacts, codes, small, tmp_path):
    with pytest.raises(VqdeployError, match=r"holds codes, on which only a prior can be trained.* --tokenizer FOLDER"):
        train("rqvae", data=str(codes), output=tmp_path / "out")
    other = artifacts.checkpoint("text")
    with pytest.raises(VqdeployError, match=r"was made from another checkpoint; expected digest .* --tokenizer FOLDER"):
        train("rqvae", data=str(codes), output=tmp_path / "out", tokenizer=other)
    assert list(tmp_path.iterdir()) == []


# Damaged folders


@pytest.fixture
def copied(codes, tmp_path):
    (tmp_path / "codes").mkdir()
    for file in codes.iterdir():
        (tmp_path / "codes" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "codes"


def rewritten(file, **columns):
    """A shard with other columns."""
    table = pq.read_table(file)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column(table[name].combine_chunks()))
    pq.write_table(table, file)


def _shifted(lists):
    return pa.FixedSizeListArray.from_arrays(pa.array(lists.flatten().to_numpy() - np.int16(64)), lists.type.list_size)


def _enlarged(lists):
    return pa.FixedSizeListArray.from_arrays(pa.array(lists.flatten().to_numpy() + np.int16(64)), lists.type.list_size)


def _lists(lists):
    return lists.cast(pa.list_(pa.int16()))


def _twos(labels):
    return pa.array([2] * len(labels), pa.int32())


def _nulls(labels):
    return pa.nulls(len(labels), pa.int32())


def _with_null(lists):
    return pa.array([None, *lists.to_pylist()[1:]], lists.type)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "_summary.json").unlink(), "is not complete. Fix: run the same vqdeploy tokenize again"),
        (lambda f: (f / "_summary.json").write_text("{}"), "Summary is incomplete"),
        (lambda f: (f / "000001.parquet").unlink(), "is damaged; expected 30 images in 4 shards, found 22 in 3"),
        (lambda f: (f / "000001.parquet").write_bytes(b"PAR1"), "000001.parquet is not a shard of codes"),
        (lambda f: rewritten(f / "000001.parquet", codes=_shifted), "its codes are not in 0..63"),
        (lambda f: rewritten(f / "000001.parquet", codes=_enlarged), "its codes are not in 0..63"),
        (lambda f: rewritten(f / "000001.parquet", codes=_lists), "its column codes has another type"),
        (lambda f: rewritten(f / "000001.parquet", codes=_with_null), "an image lacks codes"),
        (lambda f: rewritten(f / "000001.parquet", label=_twos), "labels in .* are out of range; expected 0..1"),
        (lambda f: rewritten(f / "000001.parquet", label=_nulls), "8 of 30 images in .* have no class"),
    ],
)  # fmt: skip
def test_damaged_codes_are_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(VqdeployError, match=message) as caught:
        open_data(str(copied), 16)
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_plan(copied):
    table = pq.read_table(copied / "000001.parquet")
    info = json.loads(table.schema.metadata[b"vqdeploy"])
    info["origin"]["plan"] = "another"
    pq.write_table(table.replace_schema_metadata({"vqdeploy": json.dumps(info)}), copied / "000001.parquet")
    with pytest.raises(ArtifactError, match="its shards were made with different plans"):
        shards.read(copied)


@pytest.mark.parametrize(
    ("texts", "classes", "labels"),
    [
        (("eel", "bee", "eel"), ("bee", "eel"), [1, 0, 1]),
        (("2", "0", "2"), ("0", "1", "2"), [2, 0, 2]),
        ((None, None, None), (), [0, 0, 0]),
    ],
)
def test_classes_of_tars(artifacts, tmp_path, monkeypatch, texts, classes, labels):
    """Names are numbered in their order, numbers are their own names, across shards."""
    monkeypatch.setattr(run, "_locally", lambda job, parts, workers: (tokenize_part(job, p, 1) for p in parts))
    for i, text in enumerate(texts):
        members = [("0.png", png(i)), *([("0.cls", text.encode())] if text else [])]
        write_tar(tmp_path / "in" / f"{i}.tar", members)
    tokenize(artifacts.plan("rqvae"), str(tmp_path / "in"), tmp_path / "codes")
    found = shards.read(tmp_path / "codes")
    assert (found.classes, found.labels.tolist()) == (classes, labels)
