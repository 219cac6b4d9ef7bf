"""Plans that were checked before: when their digests are not compared again, and when they are."""

import os
import shutil
import stat

import pytest

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime import checked, load
from vqdeploy.runtime.bundle import Bundle


@pytest.fixture(autouse=True)
def marks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checked, "_SETTLED_NS", -(10**12))  # files of tests are new
    return tmp_path / "cache" / "vqdeploy" / "checked-plans"


@pytest.fixture
def file(plan, tmp_path):
    return shutil.copy(plan, tmp_path / "a.plan")


@pytest.fixture
def checks(monkeypatch):
    """The plans whose digests were compared."""
    found, original = [], Bundle.verify

    def note(bundle):
        found.append(bundle.path)
        original(bundle)

    monkeypatch.setattr(Bundle, "verify", note)
    return found


def damage(path):
    """Changes one byte of the weights, and leaves size and modification time as they were."""
    times = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-70_000, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-70_000, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


def test_digests_are_compared_once(file, checks, marks):
    for _ in range(3):
        load(file)
    assert checks == [file]
    (mark,) = marks.iterdir()
    assert (mark.stat().st_size, stat.S_IMODE(mark.stat().st_mode)) == (0, 0o600)
    assert stat.S_IMODE(marks.stat().st_mode) == 0o700


def test_a_changed_file_is_checked_again(file, checks):
    load(file)
    damage(file)
    with pytest.raises(ArtifactError, match="was changed"):
        load(file)
    with pytest.raises(ArtifactError, match="was changed"):
        load(file)
    assert len(checks) == 3


def test_a_replaced_file_is_checked_again(file, plan, tmp_path, checks):
    load(file)
    other = shutil.copy2(plan, tmp_path / "other")
    damage(other)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)
    with pytest.raises(ArtifactError, match="was changed"):
        load(file)


def test_a_file_has_one_mark(file, checks, marks):
    for _ in range(3):
        load(file)
        os.utime(file)
    assert len(checks) == 3
    assert len(list(marks.iterdir())) == 1


def test_each_file_has_its_own(file, tmp_path, checks, marks):
    second = shutil.copy2(file, tmp_path / "b.plan")
    for path in (file, second, file, second):
        load(path)
    assert checks == [file, second]


def test_a_file_that_just_changed_has_none(file, checks, marks, monkeypatch):
    """A change in the same tick of the clock of the file system would not show."""
    monkeypatch.setattr(checked, "_SETTLED_NS", 60 * 10**9)
    load(file)
    load(file)
    assert len(checks) == 2
    assert not list(marks.iterdir())


def test_a_file_that_changes_while_it_is_checked_has_none(file, marks, monkeypatch):
    original = Bundle.verify

    def check(bundle):
        original(bundle)
        damage(file)

    monkeypatch.setattr(Bundle, "verify", check)
    load(file)
    assert not list(marks.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(file, checks, marks, mode):
    load(file)
    marks.chmod(mode)
    load(file)
    assert len(checks) == 2


def test_nor_one_of_another_user(file, checks, marks, monkeypatch):
    load(file)
    monkeypatch.setattr(os, "geteuid", lambda: marks.stat().st_uid + 1)
    load(file)
    os.utime(file)
    load(file)
    assert len(checks) == 3
    assert len(list(marks.iterdir())) == 1


def test_nor_one_behind_a_link(file, checks, marks, tmp_path):
    load(file)
    marks.rename(tmp_path / "elsewhere")
    marks.symlink_to(tmp_path / "elsewhere")
    load(file)
    assert len(checks) == 2


@pytest.mark.parametrize("make", ["mkdir", "symlink", "writable"])
def test_a_mark_is_a_file_that_others_cannot_write_to(file, checks, marks, tmp_path, make):
    load(file)
    (mark,) = marks.iterdir()
    if make == "writable":
        mark.chmod(0o666)
    else:
        mark.unlink()
        if make == "mkdir":
            mark.mkdir()
        else:
            mark.symlink_to(file)
    load(file)
    assert len(checks) == 2


def test_a_cache_that_cannot_be_made_does_no_harm(file, checks, tmp_path):
    (tmp_path / "cache").write_text("a file")
    load(file)
    load(file)
    assert len(checks) == 2


def test_a_cache_that_cannot_be_written_is_ignored(file, checks, marks, monkeypatch):
    def refuse(path, flags, *arguments, dir_fd=None):
        if dir_fd is not None:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *arguments)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    load(file)
    load(file)
    assert len(checks) == 2
    assert not list(marks.iterdir())


def test_nor_a_missing_home(file, checks, monkeypatch):
    def missing():
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr("pathlib.Path.home", missing)
    load(file)
    assert len(checks) == 1


def test_a_full_folder_is_emptied(file, checks, marks, monkeypatch):
    monkeypatch.setattr(checked, "_MOST", 5)
    marks.mkdir(parents=True)
    for number in range(5):
        (marks / f"1-{number}").touch()
    load(file)
    load(file)
    assert len(checks) == 1
    assert len(list(marks.iterdir())) == 1


def test_loading_without_verification_records_nothing(file, checks, marks):
    load(file, verify=False)
    assert not checks
    assert not marks.exists()
