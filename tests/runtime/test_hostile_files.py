"""Plans and packages that change while they are read, or are no files at all."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vqdeploy.engines import package as packages
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle, read_weights, weights
from vqdeploy.runtime.manifest import FILE, WEIGHTS


def run(script, *arguments):
    """A script in a process of its own, which is given up when it waits."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603


def refused(call, reason, error=ArtifactError):
    with pytest.raises(error, match=reason) as caught:
        call()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


OPEN = """
import sys
from pathlib import Path
from vqdeploy.engines import package
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load
try:
    package.read(Path(sys.argv[1])) if Path(sys.argv[1]).is_dir() else load(sys.argv[1])
except VqdeployError as error:
    print(error)
"""


def test_a_pipe_in_place_of_a_plan(tmp_path):
    os.mkfifo(tmp_path / "a.plan")
    assert "a.plan cannot be read (it is not a regular file)" in run(OPEN, tmp_path / "a.plan").stdout


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_a_device_in_place_of_a_plan(device, tmp_path):
    (tmp_path / "a.plan").symlink_to(device)
    assert "cannot be read" in run(OPEN, tmp_path / "a.plan").stdout


@pytest.mark.parametrize("name", [FILE, WEIGHTS, "encode.onnx"])
def test_a_pipe_in_a_package(package, name, tmp_path):
    folder = shutil.copytree(package, tmp_path / "package")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}" in run(OPEN, folder).stdout


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_searched(package, tmp_path):
    folder = shutil.copytree(package, tmp_path / "package")
    folder.chmod(0o600)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    become = "import os; from vqdeploy.runtime import load; from vqdeploy.engines import package; os.seteuid(65534)"
    for path in (folder, folder / "a.plan"):
        found = run(become + OPEN.replace("Path(sys.argv[1]).is_dir()", "sys.argv[1].endswith('package')"), path)
        assert "cannot be read (Permission denied)" in found.stdout, found.stderr


def test_a_plan_that_is_cut_while_it_is_open(plan, tmp_path):
    """A memory map would end the process here."""
    path = Path(shutil.copy(plan, tmp_path / "a.plan"))
    bundle = Bundle(path)
    os.truncate(path, 4096)
    refused(bundle.verify, "was truncated while it was read")
    refused(lambda: bundle.read("encode.onnx"), "was truncated while it was read")
    refused(lambda: bundle.extract(tmp_path / "out"), "was truncated while it was read")
    assert not (tmp_path / "out").exists()


def test_a_closed_plan_holds_no_handle(plan):
    def handles():
        return [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(plan)]

    before = len(handles())
    pipeline = load(plan)
    assert len(handles()) > before
    pipeline.close()
    pipeline.close()
    assert len(handles()) == before
    Bundle(plan)
    assert len(handles()) == before


def rezipped(plan, target, change):
    """A plan whose archive is written by hand."""
    with zipfile.ZipFile(plan) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        change(archive)
    return target


def test_a_directory_of_many_names(plan, tmp_path):
    def change(archive):
        for number in range(40):
            archive.writestr(f"{number}" + "x" * 60_000, b"")

    path = rezipped(plan, tmp_path / "a.plan", change)
    refused(lambda: Bundle(path), "its directory is too large")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(plan, tmp_path):
    path = rezipped(plan, tmp_path / "a.plan", lambda archive: archive.writestr("encode.onnx", b"another"))
    refused(lambda: Bundle(path), "two members have one name")


def directory_entry(content, name):
    """Where the directory of a ZIP speaks of a member."""
    at = content.rindex(b"PK\1\2")
    while content[at + 46 : at + 46 + len(name)] != name:
        at = content.rindex(b"PK\1\2", 0, at)
    return at


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (42, 0, "overlap|not a plan"),  # where its header lies
        (42, 100, "overlap|not a plan"),
        (24, 2**31, "truncated|overlap"),  # its size
        (8, 1, "encrypted"),
        (10, 8, "compressed"),
    ],
)
def test_members_that_overlap_or_are_elsewhere(plan, tmp_path, place, value, reason):
    path = rezipped(plan, tmp_path / "a.plan", lambda archive: None)
    content = bytearray(path.read_bytes())
    at = directory_entry(content, b"encode.onnx") + place
    size = 2 if place < 20 else 4
    content[at : at + size] = value.to_bytes(size, "little")
    if place == 24:
        content[at - 4 : at] = value.to_bytes(4, "little")
    path.write_bytes(content)
    refused(lambda: Bundle(path), reason)


@pytest.mark.parametrize("text", ['{"format": NaN}', '{"format": 1e999}', "[" * 5000, '{"format": ' + "9" * 6000 + "}"])
def test_a_manifest_that_is_no_json_of_ours(plan, tmp_path, text):
    with zipfile.ZipFile(tmp_path / "a.plan", "w") as archive:
        archive.writestr(FILE, text)
    refused(lambda: Bundle(tmp_path / "a.plan"), "not a plan, or is damaged")


# Weights


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True] * 4, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},  # no engine looks for numbers at odd places
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "run": "me"},
        [],
        None,
    ],
)
def test_a_header_of_weights_that_lies(entry):
    refused(lambda: weights(json.dumps({"w": entry}).encode(), 16), "the weights cannot be read")


@pytest.mark.parametrize("header", [b"", b"[]", b"null", b"nonsense", b"\xff", b"[" * 9999, b'{"w": NaN}'])
def test_a_header_of_weights_that_is_none(header):
    refused(lambda: weights(header, 16), "the weights cannot be read")


@pytest.mark.parametrize("size", [0, 2**26, 2**40, 2**63, 2**64 - 1])
def test_a_file_of_weights_that_says_how_long_its_header_is(tmp_path, size):
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", size) + content[8:])
    refused(lambda: read_weights(tmp_path / WEIGHTS), "the weights cannot be read")


def test_a_package_without_weights_of_a_stage(package, tmp_path):
    folder = shutil.copytree(package, tmp_path / "package")
    manifest = json.loads((folder / FILE).read_text())
    manifest["stages"][0]["weights"].append("nothing")
    (folder / FILE).write_text(json.dumps(manifest))
    refused(lambda: packages.read(folder), "lacks nothing of stage")


def test_a_path_that_no_system_takes(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "file" / "b"):
        (tmp_path / "file").touch()
        with pytest.raises(VqdeployError):
            load(path)
        with pytest.raises(VqdeployError):
            packages.read(path)
