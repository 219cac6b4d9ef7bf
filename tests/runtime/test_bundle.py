"""Plans on disk, and files meant to harm."""

import contextlib
import json
import mmap
import os
import pickle
import re
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from support.damage import edited, pack, unpack

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import ALIGNMENT, Bundle, sha256, tensors, write
from vqdeploy.runtime.manifest import FILE, WEIGHTS, Manifest, Provenance


def manifest(files=()) -> Manifest:
    return Manifest(
        format=1,
        name="rqvae",
        precision="fp32",
        opset=24,
        provenance=Provenance("vqdeploy", "rqvae", "tiny", "0" * 64),
        stages=(),
        members={file.name: sha256(file) for file in files},
        backend="onnxrt",
    )


def write_members(folder, contents, name="a.plan"):
    """A plan of members given as bytes."""
    files = []
    for member, content in contents.items():
        files.append(folder / member)
        files[-1].write_bytes(content)
    write(folder / name, manifest(files), files)
    return folder / name


# What a good plan is


def test_members_are_aligned_and_mapped_not_copied(plan):
    bundle = Bundle(plan)
    for name in bundle.manifest.members:
        view = np.frombuffer(bundle.member(name), np.uint8)
        base = view
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj, mmap.mmap)
        assert view.ctypes.data % ALIGNMENT == 0


def test_weights_are_views_of_the_map(plan):
    bundle = Bundle(plan)
    whole = np.frombuffer(bundle.member(WEIGHTS), np.uint8)
    for weight in tensors(bundle.member(WEIGHTS)).values():
        assert np.shares_memory(weight, whole)
        assert not weight.flags.writeable


def test_threads_read_a_plan_where_no_call_takes_a_position(plan, monkeypatch):
    """On Windows a file is read where it stands."""
    monkeypatch.setattr("vqdeploy.runtime.bundle._CHUNK", 512)  # many reads, which take turns
    expected = {name: np.array(weight) for name, weight in Bundle(plan).tensors().items()}
    monkeypatch.delattr(os, "pread")
    opened = Bundle(plan)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: opened.verify(), range(8)):
            pass
    found = opened.tensors()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected[name])


def test_zipfile_reads_it(plan):
    with zipfile.ZipFile(plan) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
    assert {entry.filename for entry in entries} == {FILE, *Bundle(plan).manifest.members}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}


def test_equal_content_gives_equal_bytes(tmp_path):
    contents = {"encode.onnx": b"graph", WEIGHTS: bytes(5000)}
    first, second = (write_members(tmp_path, contents, name).read_bytes() for name in ("a.plan", "b.plan"))
    assert first == second


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(lambda name: name != FILE),
        st.binary(max_size=3 * ALIGNMENT),
        max_size=5,
    )
)
def test_what_is_written_is_read(tmp_path_factory, contents):
    bundle = Bundle(write_members(tmp_path_factory.mktemp("plan"), contents, "?.plan"))
    bundle.verify()
    assert {name: bytes(bundle.member(name)) for name in contents} == contents
    assert bundle.sizes() == {name: len(content) for name, content in contents.items()} | {FILE: bundle.sizes()[FILE]}


def test_extract_writes_exactly_the_members(plan, tmp_path):
    written = Bundle(plan).extract(tmp_path / "deep" / "out")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in written} == {
        name: content for name, content in unpack(plan).items() if name != FILE
    }


def test_extract_writes_nothing_of_a_damaged_plan(tmp_path):
    plan = write_members(tmp_path, {"a.onnx": b"first", "b.onnx": b"second"})
    plan.write_bytes(plan.read_bytes().replace(b"second", b"Second"))
    with pytest.raises(ArtifactError, match=r"b\.onnx .* was changed"):
        Bundle(plan).extract(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extract_into_a_place_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VqdeployError, match="cannot be written"):
        Bundle(plan).extract(tmp_path / "file" / "out")


def test_a_failing_write_leaves_the_old_plan(plan, tmp_path):
    target = shutil.copy(plan, tmp_path / "old.plan")
    before = target.read_bytes()
    with pytest.raises(FileNotFoundError):
        write(target, manifest(), [tmp_path / "missing.onnx"])
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


# What is refused


def refused(path, error=ArtifactError, message=None):
    """Loading fails with one sentence and the exit code of its error."""
    with pytest.raises(VqdeployError, match=message) as caught:
        load(path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_truncated(plan, tmp_path, share):
    content = plan.read_bytes()
    short = tmp_path / "short.plan"
    short.write_bytes(content[: int(len(content) * share)])
    assert refused(short).exit_code == 1


@pytest.mark.parametrize("cut", [1, 2, 21, 22, 23, 100])
def test_truncated_by_a_few_bytes(plan, tmp_path, cut):
    (tmp_path / "short.plan").write_bytes(plan.read_bytes()[:-cut])
    refused(tmp_path / "short.plan")


@pytest.mark.parametrize("member", ["encode.onnx", "decode.onnx", "step.onnx", WEIGHTS, FILE])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_flipped_bit(plan, tmp_path, member, place):
    content = bytearray(plan.read_bytes())
    start, stop = Bundle(plan)._spans[member]
    content[start + int((stop - start) * place)] ^= 4
    (tmp_path / "bad.plan").write_bytes(content)
    refused(tmp_path / "bad.plan")


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """The bytes of a plan with little in it."""
    folder = tmp_path_factory.mktemp("little")
    return write_members(folder, {"a.onnx": b"graph", WEIGHTS: b"weights"}).read_bytes()


@settings(max_examples=400)
@given(st.data())
def test_any_changed_bytes_are_refused_or_do_no_harm(little, tmp_path_factory, data):
    content = bytearray(little)
    interesting = [i for i, byte in enumerate(little) if byte]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.sampled_from(interesting))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.plan"
    path.write_bytes(content)
    try:
        bundle = Bundle(path)
        bundle.verify()
    except VqdeployError:
        return
    members = {name: bytes(bundle.member(name)) for name in bundle.manifest.members}
    assert members == {"a.onnx": b"graph", WEIGHTS: b"weights"}


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a.plan"
    path.write_bytes(content)
    refused(path)


def test_pickle(tmp_path):
    (tmp_path / "a.plan").write_bytes(pickle.dumps({"weights": [1.0]}))
    refused(tmp_path / "a.plan", message="not a plan")


def test_torch_archive(tmp_path):
    import torch

    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.plan")
    refused(tmp_path / "a.plan", message="not a plan")


def test_empty_file(tmp_path):
    (tmp_path / "a.plan").touch()
    refused(tmp_path / "a.plan", message="not a plan")


def test_folder(tmp_path):
    assert refused(tmp_path, VqdeployError, "cannot be read").exit_code == 2


def test_missing_file(tmp_path):
    assert refused(tmp_path / "a.plan", VqdeployError, r"a\.plan does not exist.*vqdeploy build").exit_code == 2


def test_a_package_is_no_plan(package, tmp_path):
    members = [(file.name, file.read_bytes()) for file in package.iterdir()]
    refused(pack(tmp_path / "a.plan", members), VqdeployError, "vqdeploy build")


@pytest.mark.parametrize(
    "text",
    [b"", b"not json", b"[]", b"null", b"5", b'"manifest"', b"\xff\xfe", b"[" * 200_000, b'{"format": 1}'],
    ids=["empty", "text", "list", "null", "number", "string", "not utf-8", "nested", "incomplete"],
)
def test_manifest_that_is_none(tmp_path, text):
    refused(pack(tmp_path / "a.plan", [(FILE, text)]))


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, True, 1.5])
def test_manifest_of_another_version(plan, tmp_path, version):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(format=version))
    refused(path, message="format")


def test_a_newer_plan_names_the_command_that_helps(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(format=2))
    refused(path, message=r"expected 1, found 2. Fix: pip install -U vqdeploy")


def test_manifest_with_unknown_keys(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(run_at_load="rm -rf"))
    refused(path, message=r"unknown keys.*run_at_load")


def test_version_is_compared_before_keys(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(format=2, new_feature=1))
    refused(path, message="format")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("members", []),
        ("members", {"step.onnx": 5}),
        ("members", {"step.onnx": None}),
        ("stages", {}),
        ("stages", [5]),
        ("stages", [{"name": "encode"}]),
        ("provenance", None),
        ("provenance", {}),
        ("provenance", {"producer": 5}),
        ("tokenizer", 5),
        ("tokenizer", {}),
        ("tokenizer", {"image": [16, 16, 3], "maps": [[4, 4, 4]], "codebook_size": 0}),
        ("sampling", 5),
        ("sampling", {}),
        ("sampling", {"kind": "diffusion", "classes": 3}),
        ("sampling", {"kind": "autoregressive", "classes": 0}),
        ("labels", 5),
        ("labels", ["cat", "dog"]),
        ("backend", 5),
        ("backend", "tensorflow"),
        ("opset", "24"),
    ],
)
def test_manifest_with_wrong_values(plan, tmp_path, key, value):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update({key: value}))
    with pytest.raises(VqdeployError):
        load(path).generate([0])


@pytest.mark.parametrize(
    "sizes",
    [
        5,
        {"min": 1, "usual": 1, "max": 0},
        {"min": 0, "usual": 1, "max": 4},
        {"min": 3, "usual": 2, "max": 4},
        {"min": 1, "usual": 5, "max": 4},
        {"min": 1, "opt": 1, "max": 4},
    ],
)
def test_manifest_with_wrong_sizes(plan, tmp_path, sizes):
    path = edited(plan, tmp_path / "a.plan", lambda data: data["stages"][0]["dims"].update(batch=sizes))
    refused(path, message=r"dims\.batch")


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda data: data.update(opset=-3), "opset of the manifest is wrong"),
        (lambda data: data.update(name="a/b"), "name of the manifest is wrong; expected letters, digits, - and _"),
        (lambda data: data.pop("stages"), "Manifest is incomplete, without stages."),
        (lambda data: data.update(stages=[{"name": "a"}]), "Manifest.stages[0] is incomplete, without file, inputs, "),
        (lambda data: data["stages"][2].update(name="a/b"), "stages[2].name of the manifest is wrong"),
        (lambda data: data["stages"][2].update(precision="int3"), "stages.step.precision of the manifest is unknown"),
        (lambda data: data["stages"][2].update(plugins=["\x1b"]), "stages.step.plugins of the manifest is wrong"),
        (
            lambda data: data["stages"][2]["inputs"][0].update(dtype=5),
            "Manifest.stages[2].inputs[0].dtype is malformed",
        ),
        (lambda data: data["stages"][2]["dims"]["batch"].update(max="4"), "Manifest.stages[2].dims.batch.max is malf"),
        (lambda data: data["members"].update({"step.onnx": "zz"}), "members.step.onnx of the manifest is wrong"),
        (lambda data: data["provenance"].update(checkpoint="zz"), "provenance.checkpoint of the manifest is wrong"),
        (lambda data: data["provenance"].update(preset="../x"), "provenance.preset of the manifest is wrong"),
        (lambda data: data["sampling"].update(kind="diffusion"), "sampling.kind of the manifest is unknown"),
    ],
)
def test_an_error_names_the_field(plan, tmp_path, edit, field):
    refused(edited(plan, tmp_path / "a.plan", edit), ArtifactError, f"^{re.escape(field)}")


def places(data, path=()):
    """The path of every value in nested dictionaries and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@settings(max_examples=150)
@given(data=st.data())
def test_any_changed_value_of_the_manifest_is_refused_or_does_no_harm(plan, tmp_path_factory, data):
    def edit(content):
        *path, last = data.draw(st.sampled_from(list(places(content))))
        for key in path:
            content = content[key]
        if data.draw(st.booleans()):
            del content[last]
        else:
            content[last] = data.draw(st.sampled_from([None, -1, 0, 7, "x", "", [], {}, [0], 1e300, True]))

    path = edited(plan, tmp_path_factory.mktemp("fuzz") / "a.plan", edit)
    with contextlib.suppress(VqdeployError):
        assert load(path, threads=1).generate([0], temperature=1, top_k=0, top_p=1).codes.shape == (1, 4, 4, 4)


@pytest.mark.parametrize("name", ["encode.onnx", WEIGHTS])
def test_missing_member(plan, tmp_path, name):
    members = {key: content for key, content in unpack(plan).items() if key != name}
    refused(pack(tmp_path / "a.plan", members.items()), message=f"lacks .*{name}")


def test_stage_without_a_digest(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data["members"].pop("step.onnx"))
    refused(path, message=r"step\.onnx")


def test_weights_without_a_digest(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data["members"].pop(WEIGHTS))
    refused(path, message="weights")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".", ".hidden", "a\\b", "a\nb", "C:evil"])  # noqa: S108
def test_member_with_a_name_that_leaves_the_folder(tmp_path, name):
    digest = sha256(pack(tmp_path / "x", []))
    data = replace(manifest(), members={name: digest}).to_dict()
    path = pack(tmp_path / "a.plan", [(FILE, json.dumps(data)), (name, (tmp_path / "x").read_bytes())])
    with pytest.raises(ArtifactError):
        Bundle(path).extract(tmp_path / "out" / "deep")
    assert {p.name for p in tmp_path.rglob("*")} == {"a.plan", "x"}


def test_a_manifest_that_inflates(tmp_path):
    """A few kilobytes that would become gigabytes."""
    with zipfile.ZipFile(tmp_path / "a.plan", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(FILE, json.dumps(manifest().to_dict()) + " " * 10_000_000)
    refused(tmp_path / "a.plan")


@pytest.mark.parametrize("precision", ["bf16", "fp16\x1b[31mRED", ""])
def test_a_precision_that_is_not_known(plan, tmp_path, precision):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(precision=precision))
    error = refused(
        path,
        ArtifactError,
        r"^precision of the manifest is unknown; expected fp32 or fp16 or int8 or int4 or mixed, found '.*-U vqdeploy",
    )
    assert str(error).isprintable()


@pytest.mark.parametrize("field", ["producer", "builder", "checkpoint", "source", "targets"])
def test_text_that_would_steer_a_terminal(plan, tmp_path, field):
    text = "\x1b[31mRED"

    def edit(data):
        of = data if field in data else data["provenance"]
        of[field] = [text] if field == "targets" else text

    path = edited(plan, tmp_path / "a.plan", edit)
    assert str(refused(path, ArtifactError, rf"{field}\S* of the manifest is wrong; expected")).isprintable()


@pytest.mark.parametrize(
    "names", [["cat", "\ud800", "eel"], ["cat", "\x1b[31m", "eel"], ["cat", " ", "eel"], ["a"] * 3]
)
def test_labels_that_are_no_class_names(plan, tmp_path, names):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(labels=names))
    error = refused(
        path, ArtifactError, "labels of the manifest is wrong; expected distinct names of printable characters"
    )
    assert str(error).isprintable()


def test_a_backend_that_is_not_known(plan, tmp_path):
    path = edited(plan, tmp_path / "a.plan", lambda data: data.update(backend="openvino"))
    refused(path, ArtifactError, r"is for an unknown backend; found openvino\. Fix: pip install -U vqdeploy")


def test_a_device_that_is_not_supported(plan):
    with pytest.raises(VqdeployError, match="expected auto, cpu or cuda, found tpu"):
        load(plan, device="tpu")


def test_a_graph_that_is_none(plan, tmp_path):
    """Digests fit, but ONNX Runtime cannot read it."""
    members = unpack(plan)
    data = json.loads(members[FILE])
    (tmp_path / "junk").write_bytes(b"junk")
    data["members"]["step.onnx"] = sha256(tmp_path / "junk")
    members |= {FILE: json.dumps(data).encode(), "step.onnx": b"junk"}
    with pytest.raises(ArtifactError, match=r"stage step of .* cannot be opened"):
        load(pack(tmp_path / "a.plan", members.items())).session("step")


# safetensors


def blob(header, data=b"", size=None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(struct.pack("<Q", len(text) if size is None else size) + text + data)


def test_tensors_of_every_kind_are_read():
    arrays = {
        dtype: np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("float32", "float16", "int64", "int32", "uint8", "bool")
    }
    read = tensors(memoryview(save(arrays, metadata={"format": "np"})))
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        memoryview(b""),
        memoryview(b"abc"),
        blob({}, size=2**63),
        blob(entry(), bytes(8), size=2**40),
        blob(b"{"),
        blob(b"null"),
        blob(b"5"),
        blob([]),
        blob({"w": 5}),
        blob({"w": {}}),
        blob(b"[" * 100_000),
        blob(b"\xff\xff"),
        blob(entry(), b"1234"),
        blob(entry(dtype="F99"), bytes(8)),
        blob(entry(dtype=["F32"]), bytes(8)),
        blob(entry(shape=[3]), bytes(8)),
        blob(entry(shape=[-1]), bytes(8)),
        blob(entry(shape=["2"]), bytes(8)),
        blob(entry(shape=None), bytes(8)),
        blob(entry(data_offsets=[4, 12]), bytes(8)),
        blob(entry(data_offsets=[8, 0]), bytes(8)),
        blob(entry(data_offsets=[-8, 8]), bytes(8)),
        blob(entry(data_offsets=[0]), bytes(8)),
        blob(entry(data_offsets=[0.0, 8.0]), bytes(8)),
        blob(entry(extra=1), bytes(8)),
    ],
)
def test_damaged_safetensors(content):
    with pytest.raises(ArtifactError, match="weights cannot be read"):
        tensors(content)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_plan_that_is_cut_after_it_was_loaded(plan, python, tmp_path, kept):
    """Stages open on first use: to touch what is gone would kill the process."""
    script = (
        "import os, shutil, sys; from vqdeploy.errors import ArtifactError; from vqdeploy.runtime import load\n"
        "shutil.copy(sys.argv[1], 'a.plan'); pipeline = load('a.plan', threads=1)\n"
        "os.truncate('a.plan', int(sys.argv[2]))\n"
        "try: pipeline.generate([0])\n"
        "except ArtifactError as error: print(error)"
    )
    assert "a.plan was truncated while it was open" in python(script, plan, kept, cwd=tmp_path)


def test_reading_the_manifest_opens_no_engine(plan, python):
    script = (
        "import sys; from vqdeploy.runtime.bundle import Bundle; Bundle(sys.argv[1]); "
        "print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    assert python(script, plan) == "[]\n"
