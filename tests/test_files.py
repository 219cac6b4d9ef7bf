"""Writes that happen whole or not at all."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import (
    check_apart,
    check_outside,
    check_regular,
    read_json,
    real,
    replacing_file,
    replacing_folder,
    temporary_folder,
    write_json,
)


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_when_the_block_ends(tmp_path):
    with replacing_file(tmp_path / "deep" / "a") as file:
        file.write_text("new")
        assert not (tmp_path / "deep" / "a").exists()
    assert content(tmp_path) == {"deep/a": "new"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A device would be lost; a pipe stands in for it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(VqdeployError, match="it is not a regular file"), replacing_file(tmp_path / name):
            pytest.fail("the block must not run")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


OURS = ("marker", "old", "new", "x")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), replacing_file(tmp_path / "a") as file:  # noqa: PT012
        file.write_text("half")
        raise error
    assert content(tmp_path) == {"a": "old"}


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "a", OURS) as folder:
            (folder / "marker").write_text(text)
            (folder / text).write_text(text)
    assert content(tmp_path) == {"a/marker": "new", "a/new": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "marker").write_text("old")
    with pytest.raises(error), replacing_folder(tmp_path / "a", OURS) as folder:  # noqa: PT012
        (folder / "marker").write_text("half")
        raise error
    assert content(tmp_path) == {"a/marker": "old"}


def test_a_folder_with_a_file_of_the_user_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("marker", "thesis.txt"):
        (tmp_path / "a" / name).write_text("precious")
    with pytest.raises(VqdeployError, match="holds something else"), replacing_folder(tmp_path / "a", OURS):
        pytest.fail("the block must not run")
    assert content(tmp_path) == {"a/marker": "precious", "a/thesis.txt": "precious"}


@pytest.mark.parametrize("name", ["marker", "marker/notes", "x/deep/er", "sub/other", "sub/deep/marker", "link"])
def test_a_folder_with_a_folder_of_the_user_is_left_alone(tmp_path, name):
    """Even if the folder has the name of a file of ours, or lies where our files are."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "marker").write_text("ours")
    if name == "link":
        (tmp_path / "a" / "new").symlink_to(tmp_path / "mine")
    elif name == "sub/deep/marker":
        (tmp_path / "a" / "sub" / "deep").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tmp_path / "mine", tmp_path / "a" / name)
    before = content(tmp_path)
    ours = (*OURS, "sub/marker", "sub/deep/marker")
    refused = pytest.raises(VqdeployError, match=r"found (marker|x|sub/other|sub/deep|new)\. Fix")
    with refused, replacing_folder(tmp_path / "a", ours):
        pytest.fail("the block must not run")
    assert content(tmp_path) == before


def test_a_folder_of_folders_is_replaced(tmp_path):
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "a", ("sub/*.txt",)) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{text}.txt").write_text(text)
    assert content(tmp_path) == {"a/sub/new.txt": "new"}


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "marker").write_text("old")
    replace = os.replace

    def interrupted(source, target):
        if source.name == "new":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "a", OURS) as folder:
        (folder / "marker").write_text("new")
    assert content(tmp_path) == {"a/marker": "old"}


def test_the_empty_folder_one_stands_in_may_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replacing_folder(type(tmp_path)("."), OURS) as folder:
        (folder / "marker").write_text("new")
    assert content(tmp_path) == {"marker": "new"}


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(VqdeployError, match="it is a folder"), replacing_file(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("name", ["safetensors", "json"])
def test_files_are_readable_by_whom_the_umask_allows(tmp_path, name):
    """A package that one user exports is built and served by another."""
    import numpy as np
    from safetensors.numpy import save_file

    before = os.umask(0o022)
    try:
        with replacing_folder(tmp_path / "a", OURS) as folder:
            write_json(folder / "marker", {})
            save_file({"w": np.zeros(3)}, folder / "x") if name == "safetensors" else write_json(folder / "x", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "x").stat().st_mode) == 0o644


def test_json_goes_out_and_in(tmp_path):
    write_json(tmp_path / "a", {"ä": [1, None]})
    assert read_json(tmp_path / "a") == {"ä": [1, None]}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b'"\xed\xa0\x80"', b"1" * 5000])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_has_finite_numbers(tmp_path, number):
    (tmp_path / "a").write_text(f'{{"x": [{number}]}}')
    with pytest.raises(ArtifactError, match=rf"a cannot be read \({number} is not a finite number\)"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_json_that_is_too_deep(tmp_path, brackets):
    opening, closing = brackets
    for depth, fits in ((64, True), (65, False)):
        (tmp_path / "a").write_text(opening * depth + "0" * (opening != "[") + closing * depth)
        if fits:
            read_json(tmp_path / "a")
        else:
            with pytest.raises(ArtifactError, match="more than 64 levels of nested lists and objects"):
                read_json(tmp_path / "a")


def test_json_that_is_too_large(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(10**12)  # a sparse file, which is not read whole
    with pytest.raises(ArtifactError, match="more than 64 MB"):
        read_json(tmp_path / "a")


def refuse(constant):
    raise AssertionError(constant)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_what_is_written_is_json(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("json") / "a"
    write_json(file, data)
    json.loads(file.read_text("ascii"), parse_constant=refuse)


def test_null_stands_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a", {"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert read_json(tmp_path / "a") == {"a": [None, 1.5], "b": [None]}


def test_missing_json(tmp_path):
    with pytest.raises(VqdeployError, match="does not exist"):
        read_json(tmp_path / "a")


def test_pipes_and_devices_are_not_read(tmp_path):
    """Reading a pipe that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", type(tmp_path)("/dev/zero"), tmp_path):
        for read in (read_json, check_regular):
            with pytest.raises(ArtifactError, match="not a regular file"):
                read(path)


# What a disk or a death brings


@pytest.mark.parametrize("writer", ["python", "numpy", "safetensors", "pillow"])
def test_a_full_disk_names_the_file(tmp_path, writer, python):
    """A limit on the size of files stands in for it."""
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from vqdeploy.errors import VqdeployError
from vqdeploy.files import replacing_file, replacing_folder
data = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
writers = {{
    "python": lambda file: file.write_bytes(data.tobytes()),
    "numpy": lambda file: np.savez(file.open("wb"), data=data),
    "safetensors": lambda file: save_file({{"data": data}}, file),
    "pillow": lambda file: Image.fromarray(data).save(file, format="PNG"),
}}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replacing_file(Path("out.bin")) as file:
        writers["{writer}"](file)
except VqdeployError as error:
    print(error)
"""
    assert python(script, cwd=tmp_path).startswith("out.bin cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from vqdeploy.files import replacing_file, replacing_folder
replace = os.replace
def die(*_):
    print("ready", flush=True)
    signal.pause()
def replace_and_die(source, target):
    replace(source, target)
    die()
if sys.argv[1] == "file":
    with replacing_file(Path("a")) as file:
        file.write_text("half")
        die()
os.replace = replace_and_die
with replacing_folder(Path("a"), ("x",)) as folder:
    (folder / "x").write_text("new")
"""


def killed(tmp_path, kind):
    """Starts to replace `a`; yields when it is about to be cut, and kills the process afterwards."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", KILLED, kind], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path):
    with killed(tmp_path, "file") as process:
        (left,) = tmp_path.iterdir()
        with replacing_file(tmp_path / "b") as file:
            file.write_text("whole")
        assert left.exists()  # its process lives
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    with replacing_file(tmp_path / "b") as file:
        file.write_text("again")
    assert content(tmp_path) == {"b": "again"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_was_moved_away_by_a_killed_process_comes_back(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    with killed(tmp_path, "folder") as process:
        assert not (tmp_path / "a").exists()
        process.send_signal(signal.SIGKILL)
    with replacing_file(tmp_path / "b") as file:
        file.write_text("whole")
    assert content(tmp_path) == {"a/x": "old", "b": "whole"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_folders_of_others_with_such_a_name_are_kept(tmp_path):
    """Whether by another user or a link to elsewhere."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".vqdeploy-link").symlink_to(target)
    (tmp_path / "deep" / ".vqdeploy-file").write_text("x")
    with replacing_file(tmp_path / "deep" / "b") as file:
        file.write_text("whole")
    assert content(target) == {"precious": "x"}
    assert (tmp_path / "deep" / ".vqdeploy-file").exists()


def test_writers_at_the_same_time_keep_their_folders(tmp_path):
    failures = []

    def work(number):
        try:
            for _ in range(30):
                with temporary_folder(tmp_path / f"{number}") as folder:
                    (folder / "x").write_text("x")
                    assert (folder / "x").read_text() == "x"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\0", "a/b\0", "\ud800"])
@pytest.mark.parametrize(
    "use",
    [
        real,
        check_regular,
        lambda path: check_outside(Path("out"), [path]),
        lambda path: check_apart(path, [Path("in")]),
        lambda path: replacing_file(path).__enter__(),
        lambda path: replacing_folder(path, ["*"]).__enter__(),
    ],
)
def test_names_that_no_path_has_are_an_error_and_no_traceback(tmp_path, monkeypatch, name, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VqdeployError) as caught:
        use(Path(name))
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_links_that_form_a_loop_are_an_error_and_no_traceback(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    check_outside(loop, [tmp_path / "a"])
    with pytest.raises(VqdeployError), replacing_file(loop / ".." / "loop" / "x"):
        pytest.fail("a file below a loop")
