"""Image folders: one rule for `train` and `run`."""

import logging
from collections.abc import Iterator
from pathlib import Path

from vqdeploy.errors import VqdeployError, can_be_shown
from vqdeploy.runtime.images import suffixes

log = logging.getLogger("vqdeploy")

JUNK = ("__MACOSX", "@eaDir")
"""Folders that macOS and Synology leave among images."""

_NAMED = 3  # names listed in a message


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, in order of their paths; see `find_classes`.

    Raises:
        VqdeployError: There are none, images lie beside folders of images, or a folder cannot be read.
    """
    return [file for files in find_classes(folder).values() for file in files]


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class of a folder, both in order of their names.

    The subfolders are the classes; an image belongs to its class at any depth. Images in the folder itself have no
    class and come under the name "". Hidden files (names that begin with a dot) and files without an image extension
    are skipped. Links are followed; within a class, each folder is walked once.

    Raises:
        VqdeployError: There are no images, images lie beside folders of images, or a folder cannot be read.
    """
    files, folders = _listed(folder)
    loose, others = _images(files)
    classes = {}
    for path in folders:
        found, rest = _images(_below(path, {_identity(folder), _identity(path)}))
        classes[path.name] = found
        others += rest
    if others:
        log.warning(
            "%d files in %s have no image extension and are skipped: %s", len(others), folder, shortened(others)
        )
    filled = [name for name, found in classes.items() if found]
    if loose and filled:
        raise VqdeployError(
            f"{folder} holds images beside folders of images: {shortened(loose)} beside {shortened(filled)}",
            expected="images alone, or one folder for each class",
        )
    if not loose and not filled:
        raise VqdeployError(f"{folder} holds no images", expected=f"files such as {', '.join(sorted(_USUAL))}")
    return {"": loose} if loose else classes


def find_labelled(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The names of the classes of a folder, none if it has no subfolders, and its images with their labels.

    Raises:
        VqdeployError: As for `find_classes`; or a class has no images, or a name that cannot be shown.
    """
    classes = find_classes(folder)
    if empty := [name for name, found in classes.items() if not found]:
        raise VqdeployError(f"{folder} holds folders without images: {shortened(empty)}", fix="remove them")
    if odd := [name for name in classes if name and not can_be_shown(name)]:
        raise VqdeployError(
            f"{odd[0]!r} in {folder} is not a valid class name", expected="characters that can be printed"
        )
    files = [(path, label) for label, found in enumerate(classes.values()) for path in found]
    return tuple(name for name in classes if name), files


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder at any depth, without hidden ones; links are followed, and each folder is walked once.

    Raises:
        VqdeployError: A folder cannot be read.
    """
    return _below(folder, {_identity(folder)})


def shortened(names: list[Path] | list[str]) -> str:
    """The first few names of a list, and the number of the others."""
    shown = ", ".join(name.name if isinstance(name, Path) else name for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


_USUAL = (".png", ".jpg", ".webp", ".tif")


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, sorted by name, without hidden ones."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in JUNK)
        return [path for path in paths if not path.is_dir()], [path for path in paths if path.is_dir()]
    except (OSError, ValueError) as error:
        raise VqdeployError(f"{folder} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All files below a folder. Links to folders in `seen`, to which those below are added, are skipped."""
    left = [folder]
    while left:
        files, folders = _listed(left.pop())
        yield from files
        for path in reversed(folders):
            if (identity := _identity(path)) not in seen:
                seen.add(identity)
                left.append(path)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _images(files: Iterator[Path] | list[Path]) -> tuple[list[Path], list[Path]]:
    """Splits files into images and others, by extension."""
    known = suffixes()
    images: list[Path] = []
    others: list[Path] = []
    for file in files:
        (images if file.suffix.lower() in known else others).append(file)
    return images, others
