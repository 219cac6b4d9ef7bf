"""The cache folder of the user, and who else could have written what lies there."""

import os
import stat
from pathlib import Path


def folder(name: str) -> Path | None:
    """The folder `vqdeploy/NAME` in XDG_CACHE_HOME or in `~/.cache`; None without a home directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "vqdeploy" / name
    except RuntimeError:
        return None


def private(status: os.stat_result) -> bool:
    """Whether only this user can write there; on Windows the folders of a user are private anyway."""
    if os.name == "nt":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
