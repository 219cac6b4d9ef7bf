"""Writes that either happen or leave nothing behind."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqdeploy.errors import ArtifactError, VqdeployError


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its name when the block ends well and vanishes otherwise.

    Raises:
        VqdeployError: The folder cannot be written to.
    """
    if path.is_dir():
        raise VqdeployError(f"{path} cannot be written (it is a folder)", fix="name another place with -o")
    with _temporary(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def replacing_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes its place when the block ends well.

    A folder that is there already is replaced only when it is empty or holds a file named `marker`.

    Raises:
        VqdeployError: The folder is there and holds something else, or the place cannot be written to.
    """
    if path.name in ("", ".."):
        path = path.resolve()
    if path.exists() and not (path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))):
        raise VqdeployError(f"{path} holds something else and is not replaced", fix="name another folder with -o")
    with _temporary(path) as folder:
        (folder / "new").mkdir()
        yield folder / "new"
        for file in (folder / "new").iterdir():
            if file.is_file() and (folder / "new" / marker).exists():
                shutil.copymode(folder / "new" / marker, file)  # safetensors lets only the owner read its files
        if path.exists():
            os.replace(path, folder / "old")
        os.replace(folder / "new", path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
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
