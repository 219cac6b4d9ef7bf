"""Disk cache of the kernels that TensorRT-RTX compiled for this GPU.

Such a file is native code, as a plan is. It is read only if no other user can write to it or its folder, its name has
the digest of the engine, and its own digest fits.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from vqdeploy.errors import VqdeployError
from vqdeploy.files import replacing_file
from vqdeploy.runtime import user_cache
from vqdeploy.runtime.user_cache import private

_DIGEST = hashlib.sha256().digest_size

log = logging.getLogger("vqdeploy")


def folder() -> Path | None:
    """The folder: `tensorrt-rtx` in the cache of the user."""
    return user_cache.folder("tensorrt-rtx")


class KernelCache:
    """The runtime cache of one engine.

    `name` is that of the file. It must contain all of the environment that the library does not compare by itself.
    """

    def __init__(self, name: str):
        parent = folder()
        self._file = parent and parent / f"{name}.bin"
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Attaches the cache to an `IRuntimeConfig`; the first call loads the file."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._saved = _read(self._file) if self._file else b""
            if self._saved and not self._cache.deserialize(self._saved):
                log.info("%s is of another version, driver or GPU and will be replaced", self._file)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes new kernels to disk; logs a warning if it cannot."""
        serialized = self._cache.serialize()
        if self._file is None or serialized is None or (compiled := bytes(serialized)) == self._saved:
            return
        self._saved = compiled
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not private(self._file.parent.stat()):
                log.warning("kernels are not cached in %s: another user can write there", self._file.parent)
                return
            with replacing_file(self._file) as file:
                file.touch(0o600)
                file.write_bytes(hashlib.sha256(compiled).digest() + compiled)
        except (OSError, VqdeployError) as error:
            reason = str(error).partition(". Fix")[0]
            log.warning("compiled kernels cannot be cached: %s", reason)


def _read(file: Path) -> bytes:
    """The saved kernels; empty if the file is missing, damaged, or writable by another user."""
    try:
        with open(file, "rb", opener=_open) as stream:
            if not (private(file.parent.stat()) and private(os.fstat(stream.fileno()))):
                log.warning("%s is not read: another user could have written it", file)
                return b""
            data = stream.read()
    except OSError:
        return b""
    compiled = data[_DIGEST:]
    if hashlib.sha256(compiled).digest() != data[:_DIGEST]:
        log.warning("%s is damaged and is not read", file)
        return b""
    return compiled


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
