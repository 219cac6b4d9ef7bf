"""Facts of the machine, on systems that count in other units or not at all."""

import os
import sys
from types import SimpleNamespace

import pytest

from vqdeploy import machine


@pytest.fixture
def no_proc(monkeypatch):
    """Only Linux has `/proc`."""

    def absent(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", absent)


@pytest.mark.parametrize(("system", "resident"), [("freebsd", 300 * 2**10), ("darwin", 300 * 2**20)])
def test_the_peak_is_in_the_units_of_the_system(monkeypatch, no_proc, system, resident):
    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=resident), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", system)
    assert machine.peak_memory_mb() == 300


def test_windows_tells_no_peak(monkeypatch, no_proc):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory_mb() is None


def test_a_machine_without_proc_has_a_processor(no_proc):
    assert machine.cpu()


@pytest.mark.parametrize(
    ("flags", "features"),
    [("fpu avx2 fma avx512_vnni avx512f", ["avx2", "avx512f", "avx512_vnni"]), ("fpu avx avx2_like", [])],
)
def test_the_features_that_decide_how_fast_products_are(monkeypatch, flags, features):
    text = f"model name\t: Some CPU\nflags\t\t: {flags}\nmodel name\t: Another\nflags\t\t: amx_int8\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **_: text)
    assert machine.cpu_features() == features
    assert machine.cpu() == "Some CPU"


def test_features_and_load_are_unknown_elsewhere(monkeypatch, no_proc):
    monkeypatch.delattr(os, "getloadavg")
    assert machine.cpu_features() == []
    assert machine.load() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_the_peak_is_what_was_held(python):
    held = "from vqdeploy import machine\nbefore = machine.peak_memory_mb()\nheld = b'x' * (200 * 2**20)\n"
    grown = float(python(held + "print(machine.peak_memory_mb() - before)"))
    assert 190 < grown < 260
