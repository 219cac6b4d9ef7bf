"""Files of weights in every container that is published, and files that are none."""

import argparse
import json
import os
import pickle
import zipfile

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.public import save_flax

from vqdeploy.convert import containers
from vqdeploy.convert.containers import read, read_config
from vqdeploy.errors import ArtifactError, VqdeployError


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 3, generator=generator) for name in ("a.weight", "a.bias", "b.weight")}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def shifted(weights):
    return {name: weight + 1 for name, weight in weights.items()}


WRAPPERS = {  # what a file holds, and the dictionary that is taken
    "bare": (lambda w: w, ""),
    "Lightning": (lambda w: {"epoch": 1, "state_dict": w, "optimizer_states": [{"a": torch.ones(2)}]}, "state_dict"),
    "model": (lambda w: {"model": w, "args": argparse.Namespace(lr=1)}, "model"),
    "model_state_dict": (lambda w: {"iter": 1, "model_state_dict": w}, "model_state_dict"),
    "DeepSpeed": (
        lambda w: {"module": {f"_forward_module.{k}": v for k, v in w.items()}, "dp_world_size": 1},
        "module",
    ),
    "module.": (lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}, "state_dict"),
    "compiled": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, ""),
    "compiled, distributed": (lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()}, ""),
    "model.": (lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}}, "state_dict"),
    "an average beside": (lambda w: {"model": shifted(w), "ema": w, "optimizer": {"state": {}}}, "ema"),
    "a wrapped average": (
        lambda w: {"state_dict": shifted(w), "state_dict_ema": {f"module.{k}": v for k, v in w.items()}},
        "state_dict_ema",
    ),
    "a discriminator beside": (lambda w: {"model": w, "discriminator": shifted(w), "optimizer_disc": {}}, "model"),
    "deeper": (lambda w: {"checkpoint": {"state_dict": w}}, "checkpoint/state_dict"),
    "its only dictionary": (lambda w: {"weights_of_mine": w, "step": 3}, "weights_of_mine"),
    "None among them": (lambda w: w | {"nothing": None}, ""),
    "parameters": (lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()}, ""),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_are_found(weights, tmp_path, name, zipped):
    wrap, taken = WRAPPERS[name]
    torch.save(wrap(weights), tmp_path / "file", _use_new_zipfile_serialization=zipped)
    source = read(tmp_path / "file")
    same(source.weights, weights)
    assert source.taken == taken


def test_raw_weights_beside_an_average(weights, tmp_path):
    torch.save({"model": weights, "ema": shifted(weights)}, tmp_path / "file")
    same(read(tmp_path / "file", raw=True).weights, weights)


def test_an_average_of_some_weights_is_not_mixed_with_others(weights, tmp_path):
    part = {name: weight for name, weight in weights.items() if name != "a.bias"}
    torch.save({"model": weights, "ema": part}, tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"incomplete, without a\.bias and so on\. Fix: add --raw"):
        read(tmp_path / "file")


def test_several_dictionaries_are_not_guessed_between(weights, tmp_path):
    torch.save({"one": weights, "two": shifted(weights)}, tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"several dictionaries.*found one \(3 tensors\), two \(3 tensors\)"):
        read(tmp_path / "file")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint", "weights.bin", "last.ckpt"])
def test_content_decides_and_not_the_name(weights, tmp_path, name):
    save_file(weights, tmp_path / name)
    same(read(tmp_path / name).weights, weights)
    torch.save(weights, tmp_path / name)
    same(read(tmp_path / name).weights, weights)


def test_types_and_layouts_are_kept(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    weights = {"bf16": base.bfloat16(), "fp16": base.half(), "turned": base.T, "channels": torch.ones(1, 2, 3, 3)}
    weights["channels"] = weights["channels"].to(memory_format=torch.channels_last)
    torch.save(weights, tmp_path / "file")
    found = read(tmp_path / "file").weights
    same(found, weights)
    assert found["bf16"].dtype == torch.bfloat16


# Folders


def test_shards(weights, tmp_path):
    save_file({"a.weight": weights["a.weight"]}, tmp_path / "x-1.safetensors")
    save_file({k: v for k, v in weights.items() if k != "a.weight"}, tmp_path / "x-2.safetensors")
    places = {k: "x-1.safetensors" if k == "a.weight" else "x-2.safetensors" for k in weights}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    same(read(tmp_path).weights, weights)
    same(read(index).weights, weights)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(VqdeployError, match=r"x-2\.safetensors does not exist, but model\.safetensors\.index\.json"):
        read(tmp_path)
    torch.save({"b.weight": weights["b.weight"]}, tmp_path / "x-2.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks a\.bias, which"):
        read(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_shards_stay_in_their_folder(weights, tmp_path, shard):
    save_file(weights, tmp_path.parent / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard)}))
    with pytest.raises(VqdeployError, match=r"outside its folder|does not exist"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"weight_map": 3}'])
def test_malformed_indices_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match="not an index of shards"):
        read(tmp_path)


@pytest.mark.parametrize("sub", ["", "vqvae", "movq"])
def test_folders_of_diffusers(weights, tmp_path, sub):
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    save_file(shifted(weights), folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "config.json").write_text('{"_class_name": "VQModel"}')
    source = read(tmp_path)
    same(source.weights, weights)
    assert source.config == {"_class_name": "VQModel"}


def test_folders_that_hold_one_file_or_several(weights, tmp_path):
    torch.save(weights, tmp_path / "some.pth")
    same(read(tmp_path).weights, weights)
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(VqdeployError, match=r"one file of weights; expected .*, found other\.pt, some\.pth"):
        read(tmp_path)


# Flax


def test_flax(weights, tmp_path):
    tree = {f"params/layer/{name}": weight for name, weight in weights.items()}
    same(read(save_flax(tree, tmp_path / "maskgit_checkpoint")).weights, tree)


def test_flax_in_chunks_and_half(tmp_path):
    def array(weight):
        parts = list(weight.shape), str(weight.dtype).removeprefix("torch."), bytes(weight.view(torch.uint8).numpy())
        return msgpack.ExtType(1, msgpack.packb(parts))

    whole = torch.arange(6.0)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array(whole[:4]), "1": array(whole[4:])},
    }
    tree = {"params": {"big": chunked, "half": array(torch.ones(2).bfloat16()), "step": 3}}
    (tmp_path / "file").write_bytes(msgpack.packb(tree))
    found = read(tmp_path / "file").weights
    same(found, {"params/big": whole.view(2, 3), "params/half": torch.ones(2).bfloat16()})


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb({"a": 1})[:-1],
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[2], "object", b"abc"]))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[2**40], "float32", b"abcd"]))}),
        msgpack.packb({"a": msgpack.ExtType(1, b"\xc1")}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[1], "float32", 6 * 10**9]))}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": 3}}),
        b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0",
        b"\x81\xa1a" * 3000 + b"\xc0",
    ],
)
def test_damaged_flax(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is damaged|holds no weights"):
        read(tmp_path / "file")


# What is no file of weights


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"", "is empty"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"hello", "is not a weight file"),
        (b"PK\x03\x04abc", "is damaged"),
        (b"\x80\x02", "pickle is malformed"),
        (b"\x10\0\0\0\0\0\0\0{", "is damaged"),
    ],
)
def test_files_of_other_kinds_are_described(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path / "file")


def test_a_missing_file(tmp_path):
    with pytest.raises(VqdeployError, match="does not exist"):
        read(tmp_path / "none")


def test_pipes_are_not_waited_for(weights, tmp_path):
    pipe = tmp_path / "x.safetensors"
    os.mkfifo(pipe)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, pipe.name)}))
    for reader, file in ((read, pipe), (read_config, pipe), (read, index)):
        with pytest.raises(ArtifactError, match=r"x\.safetensors cannot be read \(it is not a regular file\)"):
            reader(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_download(weights, tmp_path, zipped):
    torch.save(weights, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[: len(data) - 60])
    with pytest.raises(ArtifactError):
        read(tmp_path / "file")


def test_torchscript_is_refused_and_the_way_round_is_named(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "model.jit")
    with pytest.raises(ArtifactError, match=r"TorchScript program.*state_dict\(\) with safetensors"):
        read(tmp_path / "model.jit")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused_and_the_way_round_is_named(tmp_path, zipped):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"an object of torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        read(tmp_path / "model.pkl")


# Configurations


def test_yaml_tuples_and_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("a: !!python/tuple [1, 2]\nb: 1e-6\nc: &x {d: 1}\ne: *x\n")
    assert read_config(tmp_path / "c.yaml") == {"a": [1, 2], "b": "1e-6", "c": {"d": 1}, "e": {"d": 1}}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "a: !!python/object/new:os.system ['touch MARK']",
        "!!python/name:os.system",
        "!!python/module:trap_module",
        "a: !!python/object:trap_module.Trap {}",
        '!!python/object/apply:builtins.exec [\'open("MARK", "w")\']',
        "a: !custom 1",
        "a: [",
        "a: \x00",
    ],
)
def test_no_tag_makes_an_object(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap_module.py").write_text("open('MARK', 'w')")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ArtifactError, match="is not a configuration") as caught:
        read_config(tmp_path / "c.yaml")
    assert not (tmp_path / "MARK").exists()
    assert "\n" not in str(caught.value)


def test_aliases_do_not_multiply(tmp_path):
    """A billion laughs: 40 levels of two aliases each."""
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    from vqdeploy.convert.parts import section

    assert section(read_config(tmp_path / "c.yaml"), "x") == {"x": 1}
    assert section(read_config(tmp_path / "c.yaml"), "none") == {}


def test_deep_and_large_configurations(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.yaml").write_text("a" * (1 << 21))
    for name in ("deep.yaml", "deep.json", "large.yaml"):
        with pytest.raises(ArtifactError):
            read_config(tmp_path / name)
    with pytest.raises(VqdeployError, match="does not exist"):
        read_config(tmp_path / "none.yaml")


def test_the_configuration_beside_the_weights(weights, tmp_path):
    torch.save(weights, tmp_path / "model.pt")
    (tmp_path / "config.yaml").write_text("a: 1")
    assert containers.read(tmp_path).config == {"a": 1}
    (tmp_path / "other.yaml").write_text("a: 2")
    assert containers.read(tmp_path, config=tmp_path / "other.yaml").config == {"a": 2}


@pytest.mark.parametrize("text", ['a: !!int ""', 'a: !!bool "x"', 'a: !!timestamp "x"', "a: 1" + ":1" * 100_000 + ".0"])
def test_scalars_that_are_none(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ArtifactError, match="is not a configuration"):
        read_config(tmp_path / "c.yaml")


def test_an_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(ArtifactError, match="names an index among its shards"):
        read(tmp_path)


def _shared():
    nested = ("x",)
    for _ in range(60):
        nested = nested, nested
    return nested


class _Made:
    """A pickle of what a function would make of arguments."""

    def __init__(self, function, *arguments):
        self._made = function, arguments

    def __reduce__(self):
        return self._made


@pytest.mark.parametrize("argument", [_shared(), "longdouble"])
def test_types_that_are_none(tmp_path, argument):
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps({"a": _Made(np.dtype, argument)}, protocol=2))
    with pytest.raises(ArtifactError, match="the pickle is malformed"):
        read(file)


@pytest.mark.parametrize("damage", ["encrypted", "deflated", "order", "pickle"])
def test_archives_that_cannot_be_unpacked(weights, tmp_path, damage, monkeypatch):
    torch.save(weights, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (folder,) = {name.partition("/")[0] for name in members}
    if damage == "order":
        members[f"{folder}/byteorder"] = bytes(2**27)
    if damage == "pickle":
        monkeypatch.setattr(containers, "_LARGEST_PICKLE", 10)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    data = bytearray((tmp_path / "bad.pt").read_bytes())
    at = data.index(b"PK\1\2")
    if damage == "encrypted":
        data[6] |= 1
        data[at + 8] |= 1
    if damage == "deflated":
        start = 30 + data[26] + data[28]
        data[start : start + 8] = b"\xff" * 8
    (tmp_path / "bad.pt").write_bytes(data)
    message = {"order": "big-endian", "pickle": "its pickle, without the weights, is too large"}
    with pytest.raises(ArtifactError, match=message.get(damage, "is damaged")):
        read(tmp_path / "bad.pt")
