"""A few hundred hostile files and arguments, made by `tools/fuzz.py`, which runs as many as one likes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOOLS = Path(__file__).parents[1] / "tools"
SYSTEMS = {"rqvae": "rqvae", "movq": "movq", "vqvae2": "vqvae2"}  # the harness's name, and that of the artifacts
CASES = {"checkpoint": 6, "package": 12, "image": 12, "plan graph": 16}
USUAL = 24


def module(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cases(monkeypatch_module):
    return module("fuzz_cases", monkeypatch_module)


@pytest.fixture(scope="module")
def tool(cases, monkeypatch_module):
    return module("fuzz", monkeypatch_module)


@pytest.fixture(scope="module")
def material(artifacts, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    for name, system in SYSTEMS.items():
        shutil.copytree(artifacts.package(system), folder / f"{name}-onnx")
        shutil.copy(artifacts.plan(system), folder / f"{name}.plan")
        shutil.copy(artifacts.plan(system, portable=True), folder / f"{name}-portable.plan")
    return cases.Material(folder, tuple(SYSTEMS))


@pytest.mark.parametrize("number", range(15))
def test_no_case_of_a_kind_is_a_fault(cases, material, tmp_path, number):
    kind = list(cases.KINDS)[number]
    for case in range(CASES.get(kind, USUAL)):
        folder = tmp_path / str(case)
        folder.mkdir()
        assert cases.run_case(kind, case, material, folder) in ("ok", "refused"), f"{kind} {case}"
        shutil.rmtree(folder, ignore_errors=True)


def test_all_kinds_are_tested(cases):
    assert len(cases.KINDS) == 15


def test_a_case_is_made_again_from_its_number(cases, material, tmp_path):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        cases.run_case("plan manifest", 5, material, folder)
        written.append(cases.members(folder / "a.plan")[0])
    assert json.dumps(written[0]) == json.dumps(written[1])


BROKEN = {
    "crash": "import os; os.kill(os.getpid(), 11)",
    "end": "import os; os._exit(3)",
    "spin": "while True: pass",
    "raise": "raise KeyError('x')",
    "long": "error = VqdeployError('x'); error.args = ('y' * 600,); raise error",
    "escape": "error = VqdeployError('x'); error.args = ('\\x1b[31m',); raise error",
    "memory": "raise MemoryError",
    "fine": "pass",
}


def test_the_tool_finds_every_kind_of_fault(tool, material, tmp_path, monkeypatch, capsys):
    """A tool that reports nothing must be able to report something."""
    folder = tmp_path / "tools"
    folder.mkdir()
    shutil.copy(TOOLS / "fuzz.py", folder)
    source = (TOOLS / "fuzz_cases.py").read_text()
    kinds = "".join(f"    {name!r}: lambda *_: exec({code!r}, globals()),\n" for name, code in BROKEN.items())
    (folder / "fuzz_cases.py").write_text(
        source.replace("KINDS: dict[str, Callable[[random.Random, Material, Path], None]] = {\n", "KINDS = {\n" + kinds)
    )
    monkeypatch.setattr(tool, "__file__", str(folder / "fuzz.py"))
    assert not tool.fuzz(material, list(BROKEN), 0, len(BROKEN), jobs=1, limit=2)
    told = capsys.readouterr().out
    for line in (
        "crash 0: signal: SIGSEGV",
        "end 0: signal: the process ended with 3",
        "spin 0: hang: no end after 2 s of CPU time",
        "raise 0: traceback: KeyError",
        "long 0: message: 600 characters",
        "escape 0: message: control characters",
        "memory 0: memory: MemoryError",
        f"{len(BROKEN)} cases, {len(BROKEN) - 1} faults",
    ):
        assert line in told
    assert tool.fuzz(material, ["fine"], 0, 2, jobs=1, limit=2)


@settings(max_examples=50)
@given(st.data())
def test_mutations_of_json_and_bytes_are_made_of_anything(cases, data):
    rnd = data.draw(st.randoms(use_true_random=False))
    document = {"a": [1, {"b": None}], "c": "x"}
    cases.mutate_json(document, rnd)
    cases.to_text(document)
    assert isinstance(cases.mutate_bytes(data.draw(st.binary(max_size=30)), rnd), bytes)
