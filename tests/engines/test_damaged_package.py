"""Packages that were damaged or tampered with."""

import json
import shutil

import pytest

from vqdeploy.engines.build import build
from vqdeploy.engines.package import read
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime.bundle import sha256
from vqdeploy.runtime.manifest import FILE, WEIGHTS


@pytest.fixture
def copy(package, tmp_path):
    return shutil.copytree(package, tmp_path / "package")


def edit(folder, change):
    data = json.loads((folder / FILE).read_text())
    change(data)
    (folder / FILE).write_text(json.dumps(data))


def refused(folder, message, error=ArtifactError):
    """Neither read nor built, and no plan left behind."""
    with pytest.raises(VqdeployError, match=message) as caught:
        read(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    with pytest.raises(VqdeployError, match=message):
        build(folder, folder.parent / "out" / "a.plan")
    assert not (folder.parent / "out").exists()


def test_an_untouched_package_is_read(copy):
    assert [stage.name for stage in read(copy).stages] == ["encode", "decode", "step"]


@pytest.mark.parametrize("name", ["encode.onnx", "decode.onnx", "step.onnx", WEIGHTS])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_changed_byte(copy, name, place):
    content = bytearray((copy / name).read_bytes())
    content[int(place * len(content)) if place > 0 else place] ^= 1
    (copy / name).write_bytes(content)
    refused(copy, f"{name} was changed after it was exported; expected sha256")


@pytest.mark.parametrize("name", ["step.onnx", WEIGHTS])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    refused(copy, f"{name} is missing or not a plain file. Fix: vqdeploy export")


@pytest.mark.parametrize("name", ["step.onnx", WEIGHTS])
def test_a_link_even_to_the_right_content(copy, name, tmp_path):
    shutil.move(copy / name, tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    refused(copy, f"{name} is missing or not a plain file")


def test_a_folder_in_place_of_a_file(copy):
    (copy / "step.onnx").unlink()
    (copy / "step.onnx").mkdir()
    refused(copy, "not a plain file")


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/hostname", "..", ""])
def test_a_member_outside_the_folder(copy, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    edit(copy, lambda data: data["members"].update({name: sha256(tmp_path / "secret")}))
    refused(copy, "not a plain file")


@pytest.mark.parametrize("name", ["step.onnx", WEIGHTS])
def test_a_file_without_a_digest(copy, name):
    edit(copy, lambda data: data["members"].pop(name))
    refused(copy, f"no digest for {name}")


def test_a_stage_whose_file_lies_elsewhere(copy, tmp_path):
    shutil.copy(copy / "step.onnx", tmp_path / "step.onnx")
    edit(copy, lambda data: data["stages"][2].update(file="../step.onnx"))
    refused(copy, r"no digest for \.\./step\.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00", "[" * 100_000])
def test_a_manifest_that_is_none(copy, text):
    (copy / FILE).write_text(text)
    refused(copy, "manifest|cannot be read")


def test_a_manifest_with_unknown_keys(copy):
    edit(copy, lambda data: data.update(hook="evil"))
    refused(copy, "unknown keys.*hook")


def test_a_newer_manifest(copy):
    edit(copy, lambda data: data.update(format=2))
    refused(copy, "expected 1, found 2. Fix: pip install -U vqdeploy")


@pytest.mark.parametrize("members", [[], {"step.onnx": 5}, {"step.onnx": None}])
def test_malformed_digests(copy, members):
    edit(copy, lambda data: data.update(members=members))
    refused(copy, None)


@pytest.mark.parametrize("kind", ["empty folder", "file", "nothing"])
def test_folders_that_are_no_package_are_refused(tmp_path, kind):
    target = tmp_path / "package"
    if kind == "file":
        target.write_text("x")
    elif kind == "empty folder":
        target.mkdir()
    refused(target, "is not an ONNX package; expected a folder with manifest.json. Fix: vqdeploy export", VqdeployError)
