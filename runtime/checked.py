"""Plans whose digests this user has checked before: those of a large plan take a second at each start.

The cache folder of the user has an empty file for each, a mark, named after the device, the inode, the size and the
times of the plan. A write to a file sets the change time of its inode, which programs cannot choose; one through a map
of its memory may set it late. Marks count only if no other user can write to their folder.
"""

import contextlib
import os
import stat
import time
from collections.abc import Iterator

from vqdeploy.runtime import user_cache
from vqdeploy.runtime.bundle import Bundle

_SETTLED_NS = 2_000_000_000  # a later change has another time, on file systems with coarse clocks too
_MOST = 1000  # marks


def check(bundle: Bundle) -> None:
    """Checks the digests of a plan, unless this user did so before and the file has not changed.

    Raises:
        ArtifactError: A digest differs.
    """
    with _marks() as marks:
        start, mark = time.time_ns(), _mark(bundle)
        if marks is not None and _has(marks, mark):
            return
        bundle.verify()
        changed = bundle.status().st_ctime_ns
        if marks is not None and mark == _mark(bundle) and start - changed > _SETTLED_NS:
            _add(marks, mark)


def _mark(bundle: Bundle) -> str:
    status = bundle.status()
    numbers = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return "-".join(f"{number:x}" for number in numbers)


@contextlib.contextmanager
def _marks() -> Iterator[int | None]:
    """A descriptor of the folder of marks; None if there is none, or another user can write there."""
    descriptor = None
    with contextlib.suppress(OSError):
        place = user_cache.folder("checked-plans")
        if place and os.name == "posix":
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if descriptor is None:
        yield None
        return
    try:
        yield descriptor if user_cache.private(os.fstat(descriptor)) else None
    finally:
        os.close(descriptor)


def _has(marks: int, mark: str) -> bool:
    try:
        status = os.stat(mark, dir_fd=marks, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and user_cache.private(status)


def _add(marks: int, mark: str) -> None:
    """Adds a mark in place of others of the same inode. A full folder is emptied, so that plans are checked again."""
    with contextlib.suppress(OSError):
        names = os.listdir(marks)
        inode = "-".join(mark.split("-")[:2]) + "-"
        for name in names:
            if len(names) >= _MOST or name.startswith(inode):
                os.unlink(name, dir_fd=marks)
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=marks))
