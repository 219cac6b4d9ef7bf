"""Image folders: every image is found or named, whatever tools have left among them."""

import contextlib
import logging
import os

import pytest
from PIL import Image

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.folder import find_classes, find_images


@pytest.fixture
def make(tmp_path):
    """Writes files of these names, images where the ending says so, and returns the folder."""

    def write(*names):
        for name in names:
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".png", ".jpg"):
                Image.new("RGB", (8, 8)).save(path)
            else:
                path.write_bytes(b"something else")
        return tmp_path / "in"

    return write


def names(folder):
    return {label: [str(p.relative_to(folder)) for p in files] for label, files in find_classes(folder).items()}


def test_images_without_classes(make):
    folder = make("b.png", "a.JPG", "10.png", "9.png")
    assert names(folder) == {"": ["10.png", "9.png", "a.JPG", "b.png"]}
    assert find_images(folder) == sorted(folder.iterdir())


def test_classes_are_walked_to_the_bottom(make):
    folder = make("cat/1.png", "dog/images/2.png", "dog/images/3.png", "eel/a/b/c/4.png", "eel/5.png")
    assert names(folder) == {
        "cat": ["cat/1.png"],
        "dog": ["dog/images/2.png", "dog/images/3.png"],
        "eel": ["eel/5.png", "eel/a/b/c/4.png"],
    }
    assert [path.name for path in find_images(folder)] == ["1.png", "2.png", "3.png", "5.png", "4.png"]


def test_what_is_hidden_or_left_by_tools_is_no_image_and_no_class(make):
    folder = make(
        *("a/0.png", "a/._0.png", "a/.DS_Store", "a/Thumbs.db", "b/1.png", "b/.ipynb_checkpoints/1-checkpoint.png"),
        *(".ipynb_checkpoints/0-checkpoint.png", ".cache/x/2.png", "__MACOSX/a/._0.png", "a/@eaDir/0.png/THUMB.jpg"),
    )
    assert names(folder) == {"a": ["a/0.png"], "b": ["b/1.png"]}


def test_a_hidden_folder_may_be_named_itself(make):
    folder = make(".hidden/a.png")
    assert names(folder / ".hidden") == {"": ["a.png"]}


def test_other_files_are_counted_and_do_no_harm(make, caplog):
    folder = make("a/0.png", "a/paper.pdf", "b/1.png", "b/data.h5", "README.md", "b/figure.eps", "b/list.txt")
    with caplog.at_level(logging.WARNING, "vqdeploy"):
        assert names(folder) == {"a": ["a/0.png"], "b": ["b/1.png"]}
    assert "5 files in" in caplog.text
    assert "README.md, paper.pdf, data.h5 and 2 more" in caplog.text


def test_images_beside_classes_are_refused_by_name(make):
    folder = make("0.png", "1.png", "thumbs/0.png")
    with pytest.raises(VqdeployError, match=r"holds images beside folders .*: 0\.png, 1\.png beside thumbs; expected"):
        find_classes(folder)


def test_images_beside_a_folder_of_something_else(make):
    folder = make("0.png", "notes/a.txt")
    assert find_images(folder) == [folder / "0.png"]


def test_an_empty_class_is_kept(make):
    assert names(make("a/0.png", "b/none.txt")) == {"a": ["a/0.png"], "b": []}


@pytest.mark.parametrize("files", [["a.txt"], ["a/b.txt"], [".a.png"], [".a/b.png"]])
def test_a_folder_without_images(make, files):
    with pytest.raises(VqdeployError, match=r"in holds no images; expected files such as \.jpg, "):
        find_images(make(*files))


def test_links_are_followed_but_not_in_a_circle(make, tmp_path):
    folder = make("a/0.png", "b/1.png")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")
    (folder / "b" / "2.png").symlink_to(folder / "a" / "0.png")
    assert names(folder) == {"a": ["a/0.png"], "b": ["b/1.png", "b/2.png"], "c": ["c/1.png", "c/2.png"]}


def test_a_link_to_nothing_is_not_dropped(make):
    """Who reads it says that it does not exist."""
    folder = make("a.png")
    (folder / "b.png").symlink_to(folder / "gone.png")
    assert [path.name for path in find_images(folder)] == ["a.png", "b.png"]


def test_folders_that_link_to_each_other_are_walked_once(make):
    """In every order there would be 10! walks."""
    folder = make(*(f"a/{i}/{i}.png" for i in range(11)))
    for i in range(11):
        for j in range(11):
            if i != j:
                (folder / "a" / str(i) / f"to{j}").symlink_to(folder / "a" / str(j))
    assert len(find_images(folder)) == 11


def test_folders_deeper_than_python_recurses(make, monkeypatch):
    folder, depth = make("a/0.png"), 1100
    monkeypatch.chdir(folder / "a")
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    try:
        with contextlib.suppress(VqdeployError):  # its path may be too long for the system
            assert names(folder) == {"a": ["a/0.png"]}
    finally:  # which cannot be left to pytest, whose walk recurses
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
