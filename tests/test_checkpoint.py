"""Checkpoint folders: what is saved is loaded, and what is damaged is refused."""

import dataclasses
import json
import pickle
import shutil
import time
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqdeploy import checkpoint
from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.systems import SYSTEMS, create, preset

FILE = "model.safetensors"


@pytest.fixture
def copy(checkpoint_folder, tmp_path):
    return shutil.copytree(checkpoint_folder, tmp_path / "copy")


def change(folder, edit):
    weights = load_file(folder / FILE)
    edit(weights)
    save_file(weights, folder / FILE)


def refused(folder, message, error=ArtifactError):
    with pytest.raises(VqdeployError, match=message) as caught:
        checkpoint.load(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_loaded(system, checkpoint_folder):
    loaded = checkpoint.load(str(checkpoint_folder))
    assert loaded.config == system.config
    assert loaded.state_dict().keys() == system.state_dict().keys()
    for name, weight in system.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert not loaded.training
    assert checkpoint.digest(loaded) == checkpoint.digest(system)


@pytest.mark.parametrize("name", ["movq_system", "adaptive_system"])
def test_a_masked_system_is_saved_and_loaded(request, tmp_path, name):
    """The adaptive prior ties two of its weights."""
    system = request.getfixturevalue(name)
    checkpoint.save(system, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.config == system.config
    assert checkpoint.digest(loaded) == checkpoint.digest(system)


def test_a_system_of_several_levels_is_saved_and_loaded(vqvae2_system, tmp_path):
    checkpoint.save(vqvae2_system, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.config == vqvae2_system.config
    assert checkpoint.digest(loaded) == checkpoint.digest(vqvae2_system)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[3], [6, 6]], "grid of the prior in .* is not the tokenizer's"),
        ([[6, 6], [3, 3]], "level_grids of the prior in .* is not the tokenizer's"),
        ([[9], [6, 6]], "level_grids of the prior in .* is not the tokenizer's"),
    ],
)
def test_levels_that_do_not_fit(vqvae2_system, tmp_path, grids, message):
    checkpoint.save(vqvae2_system, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for level, grid in zip(config["prior"]["levels"], grids, strict=True):
        level["grid"] = grid
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "a", message)


@pytest.mark.parametrize(("name", "value"), [("levels", 0), ("levels", 4), ("resolution", 0), ("resolution", 28)])
def test_levels_that_do_not_fit_the_resolution(vqvae2_system, tmp_path, name, value):
    checkpoint.save(vqvae2_system, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["tokenizer"][name], config["prior"] = value, None
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "a", "is too small" if value == 0 else "does not fit its levels|do not fit a resolution")


def test_the_prior_uses_the_tokenizers_codebook(checkpoint_folder):
    loaded = checkpoint.load(checkpoint_folder)
    assert loaded.prior.codebook.data_ptr() == loaded.tokenizer.quantizer.codebook.data_ptr()
    assert not [name for name in load_file(checkpoint_folder / FILE) if name.startswith("prior") and "codebook" in name]


def test_the_files_of_a_checkpoint(system, tmp_path):
    checkpoint.save(system, tmp_path / "a", training={"seed": 3})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", FILE, "training.json"}
    assert json.loads((tmp_path / "a" / "training.json").read_text()) == {"seed": 3}
    names = load_file(tmp_path / "a" / FILE)
    assert {name.split(".")[0] for name in names} == {"tokenizer", "prior"}


def test_weights_may_be_stored_as_halves(system, tmp_path):
    checkpoint.save(system, tmp_path / "half", dtype=torch.float16)
    assert {w.dtype for w in load_file(tmp_path / "half" / FILE).values()} == {torch.float16}
    loaded = checkpoint.load(tmp_path / "half").state_dict()
    for name, weight in system.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight.half().float()), name


def test_a_checkpoint_replaces_the_last_one(system, copy):
    (copy / "training.json").write_text("{}")
    checkpoint.save(system, copy)
    assert {path.name for path in copy.iterdir()} == {"config.json", FILE}
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_failing_save_leaves_the_old_one(system, copy, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(VqdeployError, match=r"copy cannot be written \(No space left on device\)"):
        checkpoint.save(system, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_folder_of_something_else_is_kept(system, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(VqdeployError, match="holds something else"):
        checkpoint.save(system, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_digest_covers_weights_and_configuration(checkpoint_folder, copy):
    original = checkpoint.digest(checkpoint.load(checkpoint_folder))

    def nudge(weights):
        weights["prior.classifier.linear.bias"][3] += 1e-6

    change(copy, nudge)
    assert checkpoint.digest(checkpoint.load(copy)) != original
    shutil.copy(checkpoint_folder / FILE, copy / FILE)
    config = json.loads((copy / "config.json").read_text())
    config["sampling"]["temperature"] = 0.8
    (copy / "config.json").write_text(json.dumps(config))
    assert checkpoint.digest(checkpoint.load(copy)) != original


@dataclass(frozen=True)
class Levels(Config):
    """As a configuration was when a plan was made of it."""

    width: int
    heads: int = 4


@dataclass(frozen=True)
class Part(Config):
    levels: tuple[Levels, ...]
    scale: float = 2.0


@dataclass(frozen=True)
class NewLevels(Levels):
    """As it is later: with one more field."""

    bias: bool = True


@dataclass(frozen=True)
class NewPart(Part):
    depth: int = 1
    inner: Levels = Levels(8)


def test_a_new_field_with_a_default_changes_no_digest(system):
    def digest(part):
        other = copy_of(system)
        other.config = replace(system.config, prior=part)
        return checkpoint.digest(other)

    old = digest(Part((Levels(64), Levels(32, heads=2))))
    assert digest(NewPart((NewLevels(64), NewLevels(32, heads=2)))) == old
    assert digest(NewPart((NewLevels(64), NewLevels(32, heads=2)), scale=2, depth=1)) == old
    others = [
        Part((Levels(64), Levels(32))),
        Part((Levels(32, heads=2), Levels(64))),
        Part((Levels(64), Levels(32, heads=2)), scale=2.5),
        NewPart((NewLevels(64, bias=False), NewLevels(32, heads=2))),
        NewPart((NewLevels(64), NewLevels(32, heads=2)), depth=2),
        NewPart((NewLevels(64), NewLevels(32, heads=2)), inner=Levels(8, heads=2)),
    ]
    assert len({old, *map(digest, others)}) == 1 + len(others)


def test_a_whole_number_is_the_same_as_a_float(system):
    """JSON of another tool may have lost the point."""
    digests = set()
    for temperature in (2, 2.0, 2.5):
        other = copy_of(system)
        other.config = replace(system.config, sampling=replace(system.config.sampling, temperature=temperature))
        digests.add(checkpoint.digest(other))
    assert len(digests) == 2


def test_the_digest_covers_the_type_and_the_shape_of_a_weight(system):
    other = copy_of(system)
    weight = other.prior.classifier.linear.weight
    other.prior.classifier.linear.weight = torch.nn.Parameter(weight.detach().reshape(32, 128))
    assert checkpoint.digest(other) != checkpoint.digest(system)


def copy_of(system):
    other = create(system.config)
    other.load_state_dict(system.state_dict())
    return other


@pytest.mark.parametrize("name", ["config.json", FILE])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    refused(copy, f"{name} does not exist", VqdeployError)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        refused(path, "is not a checkpoint folder", VqdeployError)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.9999])
def test_truncated_weights(copy, share):
    content = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(content[: int(len(content) * share)])
    refused(copy, f"{FILE} is damaged")


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), b"\xff" * 100, b"\x00" * 8])
def test_weights_that_are_something_else(copy, content):
    (copy / FILE).write_bytes(content)
    refused(copy, f"{FILE} is damaged")


def test_a_pickle_is_never_executed(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"weights": Evil()}, copy / FILE)
    refused(copy, "is damaged")
    assert not (tmp_path / "executed").exists()


def test_a_weight_of_the_wrong_shape(copy):
    change(copy, lambda weights: weights.update({"prior.classifier.linear.bias": torch.zeros(3)}))
    refused(copy, r"prior.classifier.linear.bias .* wrong shape; expected \[64\], found \[3\]")


def test_a_missing_weight(copy):
    change(copy, lambda weights: weights.pop("prior.classifier.linear.bias"))
    refused(copy, "do not have the same weights, such as prior.classifier.linear.bias")


def test_an_unknown_weight(copy):
    change(copy, lambda weights: weights.update({"prior.extra": torch.zeros(3)}))
    refused(copy, "do not have the same weights, such as prior.extra")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", ["tokenizer.decoder.conv_out.weight", "tokenizer.quantizer.codebook"])
def test_a_weight_that_is_not_finite_is_refused_where_it_is_read(copy, name, value):
    def spoil(weights):
        weights[name] = weights[name].double()
        weights[name].view(-1)[7] = value  # 1e300 is not finite in fp32

    change(copy, spoil)
    refused(copy, f"{name} in .*{FILE} is not finite; expected numbers, found NaN or infinity")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e6, torch.float16)])
def test_a_weight_that_is_not_finite_is_not_written(system, copy, value, dtype):
    spoilt = copy_of(system)
    with torch.no_grad():
        spoilt.prior.classifier.linear.bias[3] = value
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(ArtifactError, match=r"prior\.classifier\.linear\.bias in .* is not finite"):
        checkpoint.save(spoilt, copy, dtype=dtype)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def counts(part, path=()):
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Config):
            yield from counts(value, (*path, field.name))
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Config):
                    yield from counts(item, (*path, field.name, i))
                elif type(item) is int:
                    yield (*path, field.name, i)
        elif type(value) is int:
            yield (*path, field.name)


UNUSED = ("heads", "condition_kernel", "condition_res_blocks")  # by a level without attention, and by the top one


@pytest.mark.parametrize("model", SYSTEMS)
@pytest.mark.parametrize("number", [10**9, 2**63, 20_000])
def test_a_count_beyond_what_the_weights_hold_is_refused_quickly(tmp_path, model, number):
    """20,000 is no more than there are weights, and would still be that many layers."""
    folder = tmp_path / model
    checkpoint.save(create(preset(model, "tiny")), folder)
    config, start, tried = json.loads((folder / "config.json").read_text()), time.process_time(), 0
    for name in ("tokenizer", "prior"):
        for path in counts(getattr(preset(model, "tiny"), name), (name,)):
            changed = json.loads(json.dumps(config))
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = number
            (folder / "config.json").write_text(json.dumps(changed))
            if number > 20_000:
                refused(folder, f"{[key for key in path if isinstance(key, str)][-1]} in .* is too large")
            elif path[-1] not in UNUSED:
                refused(folder, None)
            tried += 1
    assert tried > 10
    assert time.process_time() - start < 2 * tried


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model": "rqvae"}', "\x00"])
def test_a_damaged_configuration(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, None)


@pytest.mark.parametrize(
    "change_",
    [
        {"width": 0},
        {"width": -64},
        {"heads": 3},
        {"heads": 0},
        {"body_layers": -1},
        {"grid": [4]},
        {"grid": [4, 4]},
        {"codebook_size": 0},
        {"width": 10**12},
        {"dropout": 7.0},
    ],
)
def test_a_configuration_of_impossible_numbers(copy, change_):
    config = json.loads((copy / "config.json").read_text())
    config["prior"].update(change_)
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, None)


def numbers(part, path=()):
    """Paths and values of all numbers of a configuration."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, dict | list):
            yield from numbers(value, (*path, key))
        elif type(value) in (int, float):
            yield (*path, key), value


def test_a_condition_without_blocks_of_its_own(three_system, tmp_path):
    assert three_system.config.prior.levels[1].condition_res_blocks == 0
    checkpoint.save(three_system, tmp_path / "a")
    assert checkpoint.load(tmp_path / "a").config == three_system.config


@pytest.mark.parametrize("model", SYSTEMS)
def test_no_size_is_below_1_and_no_share_outside_its_range(tmp_path, model):
    folder = tmp_path / model
    checkpoint.save(create(preset(model, "tiny")), folder)
    config = (folder / "config.json").read_text()
    tried = 0
    for path, value in numbers(json.loads(config)):
        may_be_none = value == 0 or path[-1] in ("condition_channels", "condition_res_blocks")
        wrong = [-1] if may_be_none else [0, -1]
        if path[-1] == "guidance_interval":
            wrong = [-2]
        elif path[-1] in ("decay", "dropout"):
            wrong = [-0.1, 2.0, float("nan")]
        elif type(value) is float:
            wrong = [float("inf"), float("nan")]
        for number in wrong:
            changed = json.loads(config)
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = number
            (folder / "config.json").write_text(json.dumps(changed))
            refused(folder, None)
            tried += 1
    assert tried > 30


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["prior", "grid"], [2, 8, 4], "grid of the prior"),
        (["prior", "codebook_size"], 64, "codebook_size of the prior"),
        (["tokenizer", "pixel_range"], [1.0], "pixel_range"),
        (["tokenizer", "pixel_range"], [1.0, 1.0], "pixel_range"),
        (["tokenizer", "conv", "resolution"], 18, "resolution"),
        (["tokenizer", "conv", "resolution"], 0, "resolution .* is too small; expected 1 or more, found 0"),
        (["tokenizer", "conv", "channel_multipliers"], [], "does not describe a model"),
        (["tokenizer", "decay"], 2.0, r"decay .* is out of range; expected 0\.\.1, found 2.0"),
        (["labels"], ["cat"], "labels"),
        (["labels"], ["cat", "\ud800", "eel"], "labels that are not valid"),
        (["labels"], ["cat", "cat", "eel"], "labels that are not valid"),
        (["sampling", "steps"], 0, "steps is out of range"),
        (["sampling", "schedule"], "foo", "no such schedule"),
        (["sampling", "top_k"], 65, "top_k is out of range"),
    ],
)
def test_a_configuration_whose_parts_do_not_fit(movq_system, tmp_path, path, value, words):
    folder = tmp_path / "movq"
    checkpoint.save(movq_system, folder)
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path
    part = config
    for name in parents:
        part = part[name]
    part[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=words):
        checkpoint.load(folder)


def test_random_weights_depend_on_the_seed_alone():
    first, second, other = (checkpoint.digest(create(preset("rqvae", "tiny"), s)) for s in (1, 1, 2))
    assert first == second != other
