"""`make gpu-check`, on measurements that are made up; without a GPU there are no others."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from vqdeploy.cli import app

PATH = Path(__file__).parents[1] / "tools" / "gpu_check.py"
GPU = {"GPU": "NVIDIA Made-Up 9000", "memory": "1 MiB", "driver": "1.2.3", "compute capability": "9.9"}
JUNIT = """<testsuites><testsuite>
<testcase name="good"/>
<testcase name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase name="idle"><skipped message="there is no CUDA device"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def tool(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


class Verbs:
    """Stands in for the command line: `ends` maps the start of a command to its code, result and complaint."""

    def __init__(self, ends):
        self.ends, self.calls = ends, []

    def __call__(self, folder, *arguments):
        line = " ".join(arguments)
        self.calls.append(line)
        if line == "env":
            return 0, {"python": "3.11", "onnxruntime-gpu": "1.31"}, ""
        if arguments[0] in ("export", "build"):
            (folder / arguments[-1]).touch()
        for part, end in self.ends.items():
            if part in line:
                return end
        if arguments[0] == "bench":
            names = ["vqdeploy", *filter(None, arguments[-1].split(","))]
            median = {"vqdeploy": 2.0, "eager": 5.0, "compile": 3.0}
            results = [
                {"task": "decode", "batch_size": size, "name": name, "median_ms": median[name] * size}
                for size in (1, 8)
                for name in names
            ]
            return 0, {"results": results}, ""
        return 0, {"checks": []}, ""


@pytest.fixture
def check(tool, monkeypatch, tmp_path):
    def run(ends, found=GPU):
        verbs = Verbs(ends)
        monkeypatch.setattr(tool, "gpu", lambda: found)
        monkeypatch.setattr(tool, "vqdeploy", verbs)
        monkeypatch.setattr(tool, "check_tests", lambda report, folder: report.tests.update(passed=3))
        code = tool.main()
        (file,) = (tmp_path / "docs").rglob("*.md")
        return code, file, file.read_text(), verbs.calls

    return run


NO_TENSORRT = {
    "--backend tensorrt-rtx": (2, {}, "tensorrt-rtx is not installed"),
    "--backend tensorrt ": (2, {}, "tensorrt is not installed"),
}


def test_without_a_gpu_it_says_so_and_ends_with_2(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool.main() == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err
    assert not list((tmp_path / "docs").rglob("*"))


def test_the_report(check):
    code, file, text, calls = check(NO_TENSORRT)
    assert code == 0
    assert file.parent.name == "measurements"
    assert file.stem.endswith("-nvidia-made-up-9000")
    assert text.startswith(f"# GPU check of {file.stem[:10]}: NVIDIA Made-Up 9000\n")
    assert "everything in fp16. In brackets" in text
    for line in (
        "| driver | 1.2.3 |",
        "| commit | unknown |",
        "| onnxruntime-gpu | 1.31 |",
        "3 passed, 0 failed, 0 skipped",
        "| movq | fp32 | onnxrt | passed |",
        "| movq | fp16 | onnxrt | passed |",
        "| rqvae | bench | onnxrt | decode | 1 | 2.0 ms | 5.0 ms (2.50) | 3.0 ms (1.50) |",
        "| vqgan | imagenet | onnxrt | decode | 8 | 16.0 ms | 40.0 ms (2.50) | 24.0 ms (1.50) |",
        "- build of rqvae tiny fp32 for tensorrt-rtx: tensorrt-rtx is not installed",
    ):
        assert line in text.splitlines()
    assert "## Failed\n\n- nothing\n" in text
    assert text.count("| onnxrt | decode |") == 2 * 15  # vqgan, maskgit and emu3 have no preset `bench`
    assert not any("tensorrt" in call for call in calls if call.startswith(("verify", "bench")))
    assert sum(call.startswith("export") for call in calls) == 2 * 9 + 15
    timed = [call for call in calls if call.startswith("bench")]
    assert len(timed) == 15
    assert all("-fp16-" in call for call in timed)


def test_its_commands_parse(check):
    verbs = typer.main.get_command(app)
    for call in check(NO_TENSORRT)[3]:
        verb, *arguments = call.split(" ")
        verbs.commands[verb].make_context(verb, [*arguments, "--json"])


def test_a_check_that_fails(check):
    broken = {"checks": [{"stage": "step", "metric": "logits", "passed": False}, {"stage": "x", "passed": True}]}
    code, _, text, _ = check(NO_TENSORRT | {"verify --engine movq": (1, broken, "")})
    assert code == 1
    assert "| movq | fp16 | onnxrt | failed |" in text
    assert "## Failed\n\n- verify of movq fp32 on onnxrt: step: logits\n" in text


def test_a_baseline_that_fails_leaves_the_others(check):
    ends = NO_TENSORRT | {"eager,compile": (1, {}, "dynamo gave up")}
    code, _, text, _ = check(ends)
    assert code == 1
    assert "| rqvae | bench | onnxrt | decode | 1 | 2.0 ms | 5.0 ms (2.50) | not timed |" in text
    assert "- bench of rqvae bench on onnxrt against eager,compile: dynamo gave up" in text


def test_a_gpu_that_nothing_runs_on(check):
    code, _, text, calls = check({"verify": (2, {}, "this ONNX Runtime has no CUDA")})
    assert code == 1
    assert "- verify of vqvae2 fp16 on tensorrt: this ONNX Runtime has no CUDA" in text
    assert text.count("Nothing ran.") == 2
    assert not any(call.startswith("bench") for call in calls)


def test_tests_are_counted_and_their_reasons_kept(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: (tmp_path / "tests.xml").write_text(JUNIT))
    report = tool.Report({})
    tool.check_tests(report, tmp_path)
    assert report.tests == {"passed": 1, "failed": 1, "skipped": 1}
    assert report.failed == ["test bad: assert 1 == 2"]
    assert report.skipped == ["test idle: there is no CUDA device"]


def test_verbs_end_with_their_code_and_their_last_line(tool, tmp_path):
    code, result, reason = tool.vqdeploy(tmp_path, "verify", "--engine", "none.plan")
    assert (code, result) == (2, {})
    assert reason.startswith("none.plan does not exist")
    assert tool.vqdeploy(tmp_path, "env")[1]["python"]


def test_every_system_has_one_published_preset_that_is_timed(tool):
    assert all(len((tool.PRESETS - {"bench"}) & definition.presets.keys()) == 1 for definition in tool.SYSTEMS.values())


def test_a_new_system_is_timed_without_a_change(check, tool, monkeypatch):
    new = SimpleNamespace(presets={"tiny": None, "bench": None})
    monkeypatch.setattr(tool, "SYSTEMS", {"new": new})
    assert "| new | bench | onnxrt | decode | 1 |" in check(NO_TENSORRT)[2]
