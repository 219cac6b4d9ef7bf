"""Atomic writes, and strict JSON."""

import contextlib
import errno
import fnmatch
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from vqdeploy.errors import ArtifactError, VqdeployError

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

_ELSEWHERE = "name another place with -o"
_TEMPORARY = ".vqdeploy-"  # prefix of temporary folders
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_LARGEST_JSON = 64 * 2**20  # bytes; manifests of large models have a few hundred kilobytes
_DEEPEST_JSON = 64  # nesting depth; ours is eight at most


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` atomically if the block succeeds and is deleted otherwise.

    Raises:
        VqdeployError: The folder cannot be written to, the disk is full, or the path is not a regular file.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise VqdeployError(f"{path} cannot be written (it is {kind})", fix=_ELSEWHERE)
    with temporary_folder(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


def named(path: Path) -> Path:
    """The path, resolved if it ends in `.` or `..`, which are no names of their own.

    Raises:
        VqdeployError: No path has such a name.
    """
    return real(path) if path.name in ("", "..") else path


def check_replaceable(path: Path, ours: Collection[str]) -> None:
    """Rejects a folder that contains anything but our files.

    Args:
        path: A folder, which may be missing.
        ours: Patterns of the paths of our files in it, such as `*.onnx` or `model/1/*`.

    Raises:
        VqdeployError: It is not a folder, contains something else, which is named, or the name is invalid.
    """
    try:
        taken, other = path.exists() and not path.is_dir(), None
        if path.is_dir():
            other = next(_others(path, [pattern.split("/") for pattern in ours]), None)
    except OSError as error:
        raise VqdeployError(f"{path} cannot be written ({error.strerror})", fix=_ELSEWHERE) from error
    if taken or other:
        found = other and other.relative_to(path)
        raise VqdeployError(
            f"{path} holds something else and is not replaced", found=found, fix="name another folder with -o"
        )


def _others(folder: Path, ours: Collection[list[str]]) -> Iterator[Path]:
    """What a folder contains besides files of these paths and the folders on the way to them."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(_TEMPORARY):
            continue
        rests = [rest for first, *rest in ours if fnmatch.fnmatchcase(entry.name, first)]
        below = [rest for rest in rests if rest]
        if below and entry.is_dir() and not entry.is_symlink():
            yield from _others(entry, below)
        elif [] not in rests or not entry.is_file():
            yield entry


@contextlib.contextmanager
def replacing_folder(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `path` atomically if the block succeeds.

    An existing folder is replaced only if it contains nothing but our files; see `check_replaceable`.

    Raises:
        VqdeployError: The folder contains other files, or cannot be written.
    """
    path = named(path)
    check_replaceable(path, ours)
    with temporary_folder(path) as folder:
        new, old = folder / "new", folder / "old" / path.name
        new.mkdir()
        old.parent.mkdir()
        yield new
        for file in filter(Path.is_file, new.iterdir()):
            file.chmod(new.stat().st_mode & 0o666)  # safetensors makes its files readable by the owner only
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
    """Yields a temporary folder beside `path`, and removes it afterwards.

    The folder of a killed process is removed by the next one that writes there.

    Raises:
        VqdeployError: The folder cannot be written, the disk is full, or no path has such a name.
    """
    real(path)  # refuses the name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        folder, lock = _locked_folder(path.parent)
    except OSError as error:
        raise VqdeployError(f"{path} cannot be written ({error.strerror})", fix=_ELSEWHERE) from error
    try:
        yield folder
    except VqdeployError:
        raise
    except Exception as error:
        if (reason := _why_not_written(error, folder)) is None:
            raise
        raise VqdeployError(f"{path} cannot be written ({reason})", fix=_ELSEWHERE) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _why_not_written(error: Exception, folder: Path) -> str | None:
    """Why a file in a folder could not be written, if the error is about that; else None."""
    if isinstance(error, OSError) and error.filename is not None:
        return error.strerror if folder in Path(os.fsdecode(error.filename)).parents else None
    # ENOSPC from `write` has no file name; safetensors reports it as text only.
    return next((text for text in map(os.strerror, _FULL) if text in str(error)), None)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and a lock on it that ends with this process; None if folders cannot be locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
        try:
            lock = _lock(folder)
        except BlockingIOError:  # removed as abandoned before it was locked
            continue
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder until the descriptor is closed, at the latest when this process ends.

    Raises:
        BlockingIOError: Another one holds the lock.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # no locks on this file system
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    """Removes the temporary folders of killed processes of this user, and restores what they had moved."""
    for folder in parent.glob(f"{_TEMPORARY}*"):
        try:
            lock = _lock(folder)
        except BlockingIOError:  # in use
            continue
        if lock is None:
            continue
        with contextlib.suppress(OSError):
            if os.fstat(lock).st_uid == os.geteuid():
                for old in folder.glob("old/*"):
                    if not (parent / old.name).exists():
                        os.replace(old, parent / old.name)
                shutil.rmtree(folder)
        os.close(lock)


def check_other(output: Path, inputs: Iterable[Path]) -> None:
    """Rejects an output that is one of the input files, or a file in an input folder, by this or by another name.

    Raises:
        VqdeployError: It names the input that would be replaced.
    """
    if not output.exists():
        return
    for path in inputs:
        for file in itertools.chain([path], path.rglob("*") if path.is_dir() else ()):
            if file.exists() and output.samefile(file):
                raise VqdeployError(f"{output} cannot be written (it is the input {file})", fix=_ELSEWHERE)


def real(path: Path) -> Path:
    """The absolute path without links; `Path.resolve` raises `RuntimeError` when links form a loop.

    Raises:
        VqdeployError: No path has such a name.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise VqdeployError(f"{path} is not the name of a path") from error


def check_outside(folder: Path, inputs: Iterable[Path]) -> None:
    """Rejects an output folder that holds one of the inputs, or is one, because it would be replaced.

    Raises:
        VqdeployError: It names the input.
    """
    if inside := [path for path in inputs if real(folder) in (real(path), *real(path).parents)]:
        raise VqdeployError(f"{folder} cannot be replaced (it holds the input {inside[0]})", fix=_ELSEWHERE)


def check_apart(folder: Path, inputs: Iterable[Path]) -> None:
    """Rejects an output folder within a folder of inputs, which it would become part of.

    Raises:
        VqdeployError: It names the input.
    """
    if around := [path for path in inputs if real(path) in real(folder).parents]:
        raise VqdeployError(f"{folder} lies in {around[0]}, which is an input", fix=_ELSEWHERE)


def check_regular(path: Path) -> None:
    """Rejects anything but a regular file: reading a pipe or a device may never end.

    Raises:
        VqdeployError: The file does not exist.
        ArtifactError: It is a folder, a pipe, a device or a socket, or cannot be reached.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as error:
        raise VqdeployError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({getattr(error, 'strerror', error)})") from error
    if not regular:
        raise ArtifactError(f"{path} cannot be read (it is not a regular file)")


def to_json(data: object, indent: int | None = None) -> str:
    """JSON in ASCII, with null for NaN and infinities."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: object) -> None:
    """Writes an object as indented JSON; see `to_json`.

    Raises:
        OSError: The file cannot be written.
    """
    path.write_text(to_json(data, indent=2) + "\n", encoding="utf-8")


def parse_json(content: bytes) -> object:
    """Parses untrusted JSON.

    Raises:
        ValueError: It is not JSON, has a number that is not finite, or is too large or too deeply nested.
    """
    if len(content) > _LARGEST_JSON:
        raise ValueError(f"it has more than {_LARGEST_JSON >> 20} MB")
    try:
        data = json.loads(content.decode("utf-8"), parse_constant=_refuse, parse_float=_parse_float)
    except RecursionError:
        data, deep = None, True
    else:
        deep = _depth(data) > _DEEPEST_JSON
    if deep:
        raise ValueError(f"more than {_DEEPEST_JSON} levels of nested lists and objects")
    return data


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number[:20]} is not a finite number")


def _parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _depth(data: object) -> int:
    """Nesting depth of lists and objects."""
    depth, level = 0, [data]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def read_json(path: Path) -> object:
    """Reads a JSON file; see `parse_json`.

    Raises:
        VqdeployError: There is no such file.
        ArtifactError: It is not a regular file, or not JSON.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            return parse_json(stream.read(_LARGEST_JSON + 1))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from error
