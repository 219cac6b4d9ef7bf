"""Writes that either happen or leave nothing behind."""

import contextlib
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vqdeploy.errors import ArtifactError, VqdeployError


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its name when the block ends well and vanishes otherwise.

    Raises:
        VqdeployError: The folder cannot be written to, or the path is taken by what is no file.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise VqdeployError(f"{path} cannot be written (it is {kind})", fix="name another place with -o")
    with temporary_folder(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


def check_replaceable(path: Path, ours: Collection[str]) -> None:
    """Refuses a place that holds anything but files that we write.

    Args:
        path: A folder, which need not exist.
        ours: Patterns of the names of such files.

    Raises:
        VqdeployError: The place is taken by something else, or its name will not do.
    """
    try:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        taken = path.exists() and not path.is_dir()
    except OSError as error:
        raise VqdeployError(f"{path} cannot be written ({error.strerror})", fix="name another place with -o") from error
    if taken or not all(any(fnmatch.fnmatchcase(name, pattern) for pattern in ours) for name in names):
        raise VqdeployError(f"{path} holds something else and is not replaced", fix="name another folder with -o")


@contextlib.contextmanager
def replacing_folder(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes its place when the block ends well.

    A folder that is there already is replaced only when it holds nothing but files of ours; see `check_replaceable`.

    Raises:
        VqdeployError: The folder is there and holds something else, or the place cannot be written to.
    """
    if path.name in ("", ".."):
        path = path.resolve()
    check_replaceable(path, ours)
    with temporary_folder(path) as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        yield new
        for file in new.iterdir():
            file.chmod(new.stat().st_mode & 0o666)  # safetensors lets only the owner read its files
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path`, for what is to take its place, and removes it afterwards.

    Raises:
        VqdeployError: The place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise VqdeployError(f"{path} cannot be written ({error.strerror})", fix="name another place with -o") from error
    try:
        yield folder
    except OSError as error:
        if error.filename is None or folder not in Path(os.fsdecode(error.filename)).parents:
            raise
        raise VqdeployError(f"{path} cannot be written ({error.strerror})", fix="name another place with -o") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        VqdeployError: There is no such file.
        ArtifactError: It is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VqdeployError(f"{path} does not exist") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from error
