"""Files of compiled kernels are code: which ones are read, and what becomes of the others."""

import hashlib
import os
from pathlib import Path

import pytest

from vqdeploy.runtime.kernel_cache import KernelCache, folder


class Cache:
    """The library's own."""

    def __init__(self):
        self.content = b"new"
        self.offered = None

    def deserialize(self, blob):
        self.offered = blob
        if blob.startswith(b"other"):
            return False
        self.content = blob
        return True

    def serialize(self):
        return memoryview(self.content)


class Config:
    def __init__(self):
        self.caches = []

    def create_runtime_cache(self):
        return Cache()

    def set_runtime_cache(self, cache):
        self.caches.append(cache)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vqdeploy" / "tensorrt-rtx"


def opened(name="a"):
    cache, config = KernelCache(name), Config()
    cache.attach(config)
    return cache, config.caches[0]


def test_compiled_kernels_are_cached(place):
    cache, found = opened()
    assert found.offered is None
    found.content = b"compiled"
    cache.save()
    assert [file.name for file in place.iterdir()] == ["a.bin"]
    assert opened()[1].offered == b"compiled"
    assert opened("b")[1].offered is None


def test_all_contexts_share_one_cache():
    cache, config = KernelCache("a"), Config()
    cache.attach(config)
    cache.attach(config)
    assert config.caches[0] is config.caches[1]


def test_nothing_is_written_twice(place):
    cache, _ = opened()
    cache.save()
    written = (place / "a.bin").stat().st_mtime_ns, (place / "a.bin").stat().st_ino
    cache.save()
    opened()[0].save()
    assert ((place / "a.bin").stat().st_mtime_ns, (place / "a.bin").stat().st_ino) == written


def test_a_rejected_cache_is_replaced(place):
    cache, found = opened()
    found.content = b"other GPU"
    cache.save()
    cache, found = opened()
    assert found.offered == b"other GPU"
    cache.save()
    assert opened()[1].offered == b"new"


DAMAGE = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "empty": lambda data: b"",
    "without its end": lambda data: data[:20],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_not_read(place, damage, caplog):
    opened()[0].save()
    file = place / "a.bin"
    file.write_bytes(damage(file.read_bytes()))
    assert opened()[1].offered is None
    assert "a.bin is damaged and is not read" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a user's folders to that user")
@pytest.mark.parametrize(("mode_of_folder", "mode"), [(0o720, 0o600), (0o702, 0o600), (0o700, 0o620), (0o700, 0o602)])
def test_what_another_could_have_written_is_not_read(place, mode_of_folder, mode, caplog):
    opened()[0].save()
    (place / "a.bin").chmod(mode)
    place.chmod(mode_of_folder)
    assert opened()[1].offered is None
    assert "another user could have written it" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a user's folders to that user")
def test_what_belongs_to_another_is_not_read(place, monkeypatch, caplog):
    opened()[0].save()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert opened()[1].offered is None
    assert "another user could have written it" in caplog.text


def test_a_link_is_not_followed(place, tmp_path):
    place.mkdir(mode=0o700, parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(hashlib.sha256(b"x").digest() + b"x")
    (place / "a.bin").symlink_to(elsewhere)
    assert opened()[1].offered is None


def test_without_a_place_to_write_to_there_is_a_warning(place, caplog):
    place.parent.mkdir(parents=True)
    place.write_text("a file where the folder should be")
    opened()[0].save()
    assert "cannot be cached" in caplog.text
    assert "Fix" not in caplog.text


@pytest.mark.parametrize("named", ["", "relative/place"])
def test_the_folder_is_in_the_home_of_the_user(monkeypatch, tmp_path, named):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "vqdeploy" / "tensorrt-rtx"


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    opened()[0].save()


def test_a_library_that_gives_nothing_to_keep(place):
    cache, found = opened()
    found.serialize = lambda: None
    cache.save()
    assert not place.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a user's folders to that user")
def test_nothing_is_written_where_another_can(place, caplog):
    place.mkdir(parents=True)
    place.chmod(0o770)
    opened()[0].save()
    assert not list(place.iterdir())
    assert "kernels are not cached in" in caplog.text
