"""Writes that happen whole or not at all."""

import os
import stat

import pytest

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json, replacing_file, replacing_folder, write_json


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


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path / "a")


def test_missing_json(tmp_path):
    with pytest.raises(VqdeployError, match="does not exist"):
        read_json(tmp_path / "a")
