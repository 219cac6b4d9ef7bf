"""Pickles are data: whatever opcode asks for a call, nothing is called and nothing is imported."""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqdeploy.convert import containers, pickles
from vqdeploy.errors import ArtifactError


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported or when what it holds is called."""
    mark = tmp_path / "mark"
    (tmp_path / "trap_module.py").write_text(
        "import pathlib\n"
        f"def spring(*args, **kwargs):\n    pathlib.Path({str(mark)!r}).touch()\n    return {{}}\n"
        "class Trap:\n"
        "    __new__ = spring\n    __init__ = spring\n    __setstate__ = spring\n    __reduce__ = spring\n"
        "    append = extend = add = __setitem__ = update = spring\n"
        "spring()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("trap_module", None)


S = b"\x8c\x0btrap_module\x8c\x06spring\x93"  # STACK_GLOBAL
T = b"\x8c\x0btrap_module\x8c\x04Trap\x93"
CALLS = {
    "GLOBAL": b"ctrap_module\nspring\n",
    "STACK_GLOBAL": S,
    "REDUCE": S + b")R",
    "REDUCE with arguments": S + b"\x8c\x02ls\x85R",
    "REDUCE of a class": T + b")R",
    "NEWOBJ": T + b")\x81",
    "NEWOBJ_EX": T + b")}\x92",
    "OBJ": b"(" + T + b"o",
    "INST": b"(itrap_module\nspring\n",
    "BUILD": T + b")\x81}b",
    "BUILD of a class": T + b"}b",
    "BUILD with slots": T + b")\x81}}\x86b",
    "APPEND": T + b")\x81K\x01a",
    "APPENDS": T + b")\x81(K\x01e",
    "ADDITEMS": T + b")\x81(K\x01\x90",
    "SETITEM": T + b")\x81K\x01K\x02s",
    "SETITEMS": T + b")\x81(K\x01K\x02u",
    "a dotted name": b"\x8c\x02os\x8c\x0bpath.exists\x93\x8c\x01/\x85R",
    "getattr": b"cbuiltins\ngetattr\n" + S + b"\x8c\x08__call__\x86R)R",
    "eval": b"cbuiltins\neval\n\x8c\x1b__import__('trap_module').a\x85R",
    "os.system": b"cos\nsystem\n\x8c\x04true\x85R",
    "a call in a call": S + b")R)R",
    "a key": b"}" + T + b")\x81K\x01s",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Ptrap_module.spring\n",
    "BINPERSID": S + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"\x97\x98",
}


def in_a_zip(data, file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return file


def as_a_file(data, file):
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("container", [in_a_zip, as_a_file])
@pytest.mark.parametrize("name", CALLS)
def test_no_opcode_calls(trap, tmp_path, monkeypatch, name, container):
    monkeypatch.setattr(os, "system", lambda *_: trap.touch())
    data = b"\x80\x04}\x8c\x01a" + CALLS[name] + b"s."
    with pytest.raises(ArtifactError) as caught:  # of a pickle that holds no weights, if of nothing else
        containers.read(container(data, tmp_path / "file"))
    assert not trap.exists()
    assert "trap_module" not in sys.modules
    assert "\n" not in str(caught.value)


def test_every_opcode_that_takes_something_off_the_stack_is_tried_or_makes_a_container():
    """A new opcode of Python would be refused: the reader knows its opcodes by name."""
    known = {name.split(" ")[0] for name in CALLS} | {"a", "getattr", "eval", "os.system"}
    plain = {"POP", "DUP", "POP_MARK", "STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
    containers_ = {"LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "DICT", "FROZENSET"}
    import pickletools

    taking = {opcode.name for opcode in pickletools.opcodes if opcode.stack_before}
    assert taking - plain - containers_ <= known


class Callback:
    """A class that is gone by the time its pickle is read."""

    __module__ = "gone_module"


class Hyper(dict):
    """A dictionary of a class that is gone, as Lightning's AttributeDict."""

    __module__ = "gone_module"


@pytest.fixture
def gone(monkeypatch):
    """A module that exists while a checkpoint is written, and not when it is read."""
    module = types.ModuleType("gone_module")
    for kind in (Callback, Hyper):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "gone_module", module)
    return module


def training_checkpoint(weights):
    hyper = Hyper(rate=0.1)
    hyper.extra = Callback()
    return {
        "epoch": np.float64(3.5),
        "best": np.int64(4),
        "where": pathlib.PurePosixPath("runs/1"),
        "counts": collections.defaultdict(int, {"a": 1}),
        "hyper_parameters": hyper,
        "callbacks": {Callback: {"state": {1, 2, 3}}},
        "args": argparse.Namespace(lr=1e-4),
        "device": torch.device("cpu"),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "state_dict": weights,
    }


@pytest.fixture
def weights():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "whole": base,
        "transposed": base.T,
        "part": base[1:3, ::2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_is_read_with_stand_ins(gone, weights, monkeypatch, tmp_path, zipped):
    file = tmp_path / "last.ckpt"
    torch.save(training_checkpoint(weights), file, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "gone_module")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    source = containers.read(file)
    assert source.taken == "state_dict"
    assert source.weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert source.weights[name].dtype == weight.dtype
        assert torch.equal(source.weights[name], weight.detach()), name
    assert "gone_module" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_as_pytorch_reads_them(weights, tmp_path, zipped):
    file = tmp_path / "weights.pt"
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    trusted = torch.load(file, weights_only=True)
    own = containers.read(file).weights
    assert own.keys() == trusted.keys()
    for name in weights:
        assert torch.equal(own[name], trusted[name])


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy_are_weights(tmp_path, protocol):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((3, 4)).astype(np.float32),
        "b": np.asfortranarray(rng.random((3, 4))),
        "c": np.arange(5),
        "d": rng.random(3).astype(">f4"),
    }
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays, protocol))
    if protocol < 2:
        with pytest.raises(ArtifactError, match="is not a weight file"):
            containers.read(tmp_path / "arrays.pkl")
        return
    found = containers.read(tmp_path / "arrays.pkl").weights
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=20,
    ),
    st.integers(0, 5),
)
def test_plain_values_are_read_as_they_were(value, protocol):
    found = pickles.load(io.BytesIO(pickle.dumps(value, protocol)))
    if protocol >= 3 or not _has_bytes(value):
        assert found == value


def _has_bytes(value):
    if isinstance(value, list | tuple):
        return any(map(_has_bytes, value))
    return any(map(_has_bytes, value.values())) if isinstance(value, dict) else isinstance(value, bytes)


@given(st.binary(max_size=200))
def test_noise_raises_no_other_error(data):
    with contextlib.suppress(ArtifactError):
        pickles.load(io.BytesIO(b"\x80\x04" + data))


@given(
    st.lists(st.sampled_from([*CALLS.values(), b"(", b"0", b"1", b"2", b"}", b"]", b")", b"l", b"t", b"d", b"K\x01"]))
)
def test_any_program_ends_and_calls_nothing(parts):
    before = set(sys.modules)
    with contextlib.suppress(ArtifactError):
        pickles.load(io.BytesIO(b"\x80\x04" + b"".join(parts) + b"."))
    assert "trap_module" not in set(sys.modules) - before


def test_a_tensor_cannot_reach_beyond_its_storage():
    """Bounds are checked, whatever a pickle says of sizes, strides and offsets."""

    def numbers(*values):
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"

    wrong = [
        (0, (10**9,), (0,)),
        (1, (4,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (4, 1)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
    ]
    for offset, size, stride in wrong:
        key = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x04tQ"
        place = b"J" + offset.to_bytes(4, "little", signed=True)
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + key + place + numbers(*size) + numbers(*stride) + b"\x89}tR."
        with pytest.raises(ArtifactError, match=r"beyond its storage|larger than its storage|shape of a tensor"):
            pickles.load(io.BytesIO(b"\x80\x02" + tensor), lambda key, dtype, count: torch.zeros(count, dtype=dtype))


def test_shared_dictionaries_do_not_multiply(tmp_path):
    """A lattice of 60 levels has 2^60 paths, and 60 dictionaries."""
    tree = {"weight": torch.ones(2)}
    for _ in range(60):
        tree = {"a": tree, "b": tree, "marker": argparse.Namespace()}
    torch.save(tree, tmp_path / "lattice.pt")
    assert list(containers.read(tmp_path / "lattice.pt").weights) == ["weight"]


def test_a_loop_ends(tmp_path):
    tree = {"note": argparse.Namespace()}
    tree["self"] = tree
    torch.save(tree, tmp_path / "loop.pt")
    with pytest.raises(ArtifactError, match="holds no weights"):
        containers.read(tmp_path / "loop.pt")


def test_depth_does_not_crash(tmp_path):
    parts = [b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 200_000, b"}" + b"\x8c\x01a}" * 50_000 + b"s" * 50_000]
    for part in parts:
        data = b"\x80\x04}" + part + b"K\x01s."  # a deep key
        with pytest.raises(ArtifactError):
            containers.read(as_a_file(data, tmp_path / "deep"))


def test_a_deep_tree_is_no_endless_recursion(tmp_path):
    data = b"\x80\x04" + b"}\x8c\x01a" * 5000 + b"K\x01" + b"s" * 5000 + b"."
    with pytest.raises(ArtifactError, match="holds no weights"):
        containers.read(as_a_file(data, tmp_path / "deep"))


@pytest.mark.parametrize("size", [10**6, 2**40])
def test_a_storage_larger_than_the_file_is_refused(tmp_path, size):
    def number(value):
        return b"\x8a\x08" + value.to_bytes(8, "little")

    magic = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    key = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + number(size) + b"NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + key + b"K\x00" + number(size) + b"\x85K\x01\x85\x89}tR"
    tree = b"\x80\x02}\x8c\x01w" + tensor + b"s."
    data = b"".join([b"\x80\x02" + magic + b".", b"\x80\x02M\xe9\x03.", b"\x80\x02}.", tree, b"\x80\x02]\x8c\x010a."])
    with pytest.raises(ArtifactError, match="larger than the file"):
        containers.read(as_a_file(data, tmp_path / "bomb"))


def test_an_archive_that_inflates_is_read_no_further_than_its_tensors(tmp_path):
    """A compressed member is read as far as the storage says, and refused where it is shorter."""
    torch.save({"state_dict": {"weight": torch.arange(4.0)}, "args": argparse.Namespace()}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name) + b"\0" * 10_000_000 if "/data/" in name else old.read(name)
            new.writestr(name, data, zipfile.ZIP_DEFLATED)
    assert torch.equal(containers.read(tmp_path / "b.pt").weights["weight"], torch.arange(4.0))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_holds_no_more_than_weights_can_be_packed_into(tmp_path, method):
    torch.save({"state_dict": {"weight": torch.zeros(10**5)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ArtifactError, match="unpacked, it is more than 20 times as large"):
        containers.read(tmp_path / "b.pt")


def test_old_files_hold_all_storages_that_they_name(tmp_path):
    """Each of these is as large as the file, which has room for one."""
    tree = {f"w{i}": torch.zeros(1000) for i in range(3)}
    torch.save(tree, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(data[:-9000])
    with pytest.raises(ArtifactError, match="its tensors are larger than the file"):
        containers.read(tmp_path / "old.pt")


U1 = b"cnumpy\ndtype\nU\x02u1\x85R"
COPIES = {  # a value of 10,000 elements in the memo, and a few bytes that ask for a copy
    "list": (b"(" + b"N" * 10_000 + b"lq\x010c__builtin__\nlist\nq\x020", b"h\x02h\x01\x85R"),
    "dictionary": (b"))\x86q\x030(" + b"h\x03" * 10_000 + b"lq\x010cbuiltins\ndict\nq\x020", b"h\x02h\x01\x85R"),
    "bytes": (b"X\x10'\0\0" + b"a" * 10_000 + b"q\x010c_codecs\nencode\nq\x020", b"h\x02h\x01\x85R"),
    "array": (
        b"B\x10'\0\0" + b"a" * 10_000 + b"q\x010cnumpy.core.numeric\n_frombuffer\nq\x020" + U1 + b"q\x030",
        b"h\x02(h\x01h\x03M\x10'\x85tR",
    ),
    "state of an array": (
        b"B\x10'\0\0" + b"a" * 10_000 + b"q\x010cnumpy.core.multiarray\n_reconstruct\nq\x020" + U1 + b"q\x030",
        b"h\x02)R(K\x01M\x10'\x85h\x03\x89h\x01tb",
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_shared_values_are_bounded(kind):
    value, copy = COPIES[kind]

    def program(copies):
        return io.BytesIO(b"\x80\x02(" + value + copies * copy + b"l.")

    assert len(pickles.load(program(2))) == 2
    with pytest.raises(ArtifactError, match="it copies its values again and again"):
        pickles.load(program(100))


def test_a_buffer_is_bytes(tmp_path):
    data = b"\x80\x02cnumpy.core.numeric\n_frombuffer\n(I6000000000\n" + U1 + b"I1\n\x85U\x01CtR."
    with pytest.raises(ArtifactError, match="an array does not hold numbers"):
        pickles.load(io.BytesIO(data))


def test_arrays_of_any_order_are_read_as_they_were(tmp_path):
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    (tmp_path / "file").write_bytes(pickle.dumps({"a": array, "b": np.asfortranarray(array)}, 2))
    for found in containers.read(tmp_path / "file").weights.values():
        assert np.array_equal(found.numpy(), array)
