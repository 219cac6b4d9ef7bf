"""`make gpu-check`: tests, parity and speed on this machine's GPU, as one dated report under docs/measurements."""

import datetime
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vqdeploy.files import replacing_file
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.systems import SYSTEMS

ROOT = Path(__file__).parents[1]
DTYPES = ("fp32", "fp16")
TIMED = "fp16"
PRESETS = {  # to time, of the systems that have them
    "bench",
    "imagenet-1400m",
    "halton-large",
    "vim-base",
    "imagenet",
    "ffhq",
    "imagenet-256",
    "vision",
    "xl-384",
    "d30",
}
BENCH = ("--device", "cuda", "--batch-size", "1", "--batch-size", "8")
BASELINES = ("eager,compile", "eager", "")  # the first that ends well
MINUTES = 60  # of one command


@dataclass
class Report:
    """What was found: lines of each table, and what was skipped or failed, with the reason."""

    facts: dict[str, str]
    tests: Counter[str] = field(default_factory=Counter)
    parity: list[tuple[str, ...]] = field(default_factory=list)
    speed: list[tuple[str, ...]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def note(self, what: str, code: int, reason: str) -> None:
        """Keeps the reason of a command that did not end well: with code 2, something is missing here."""
        (self.skipped if code == 2 else self.failed).append(f"{what}: {reason}")

    def text(self) -> str:
        """The report in Markdown."""
        tests = ", ".join(f"{self.tests[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        speed = ("system", "preset", "backend", "task", "batch", "plan", "eager", "compile")
        return "\n".join(
            [
                f"# GPU check of {self.facts['date']}: {self.facts['GPU']}\n",
                "Written by `make gpu-check`. fp32 is without TF32.\n",
                *_table(("", ""), list(self.facts.items())),
                f"\n## Tests marked gpu\n\n{tests}\n",
                "## Parity with PyTorch\n\n`vqdeploy verify` of the tiny system:\n",
                *_table(("system", "precision", "backend", "result"), self.parity),
                f"\n## Speed\n\nMedian times of `vqdeploy bench {' '.join(BENCH)} --baseline eager,compile`;",
                f"everything in {TIMED}. In brackets, how many times faster the plan is than PyTorch on the same GPU.",
                "Weights are random.\n",
                *_table(speed, self.speed),
                *_list("Failed", self.failed),
                *_list("Skipped", self.skipped),
                "",
            ]
        )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)] if rows else ["Nothing ran."]


def _list(title: str, lines: list[str]) -> list[str]:
    return [f"\n## {title}\n", *(f"- {line}" for line in lines or ["nothing"])]


def gpu() -> dict[str, str]:
    """Name, memory, driver and compute capability of the first GPU; empty when none answers."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return {}
    names = ("GPU", "memory", "driver", "compute capability")
    return dict(zip(names, map(str.strip, found.splitlines()[0].split(",")), strict=True)) if found.strip() else {}


def commit() -> str:
    """What is checked out."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def vqdeploy(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code of a verb, what it printed as JSON, and the last line of its complaint."""
    command = [sys.executable, "-m", "vqdeploy", *arguments, "--json"]
    print("vqdeploy", *arguments, flush=True)
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        return 2, {}, f"took more than {MINUTES} minutes"
    printed = done.stdout.strip().splitlines() or [""]  # libraries may print too, but before the end
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    result = json.loads(printed[-1]) if printed[-1].startswith("{") else {}
    return done.returncode, result, lines[-1].removeprefix("error: ")


def check_tests(report: Report, folder: Path) -> None:
    """Every test that is marked gpu."""
    results = folder / "tests.xml"
    print("pytest -m gpu", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={results}"]
    subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603
    if not results.exists():
        report.note("tests", 1, "pytest did not run")
        return
    for case in ElementTree.parse(results).iter("testcase"):  # noqa: S314  (our own file)
        ends = [(part, part.get("message", "")) for part in case if part.tag in ("failure", "error", "skipped")]
        for part, message in ends:
            reason = (message.splitlines() or ["no reason given"])[0]
            report.note(f"test {case.get('name')}", 2 if part.tag == "skipped" else 1, reason)
        kinds = {part.tag for part, _ in ends}
        report.tests["failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"] += 1


def plan_of(report: Report, folder: Path, system: str, preset: str, dtype: str, backend: str) -> str | None:
    """Exports a system, unless that was done, and builds it; None when that is not possible."""
    package, plan = f"{system}-{preset}-{dtype}-onnx", f"{system}-{preset}-{dtype}-{backend}.plan"
    # Sixteen rows hold eight images with guidance.
    steps = [("build", package, "--backend", backend, "--device", "cuda", "--max-batch", "16", "-o", plan)]
    if not (folder / package).exists():
        model = ("--model", system, "--preset", preset, "--dtype", dtype)
        steps.insert(0, ("export", *model, "--no-verify", "-o", package))
    for step in steps:
        code, _, reason = vqdeploy(folder, *step)
        if code:
            report.note(f"{step[0]} of {system} {preset} {dtype} for {backend}", code, reason)
            return None
    return plan


def check_parity(report: Report, folder: Path) -> list[str]:
    """The tiny system of each architecture against PyTorch; returns the backends that ran."""
    for backend, system, dtype in itertools.product(BACKENDS, SYSTEMS, DTYPES):
        if plan := plan_of(report, folder, system, "tiny", dtype, backend):
            code, result, reason = vqdeploy(folder, "verify", "--engine", plan, "--device", "cuda")
            broken = [f"{c['stage']}: {c['metric']}" for c in result.get("checks", []) if not c["passed"]]
            if code:
                report.note(f"verify of {system} {dtype} on {backend}", code, "; ".join(broken) or reason)
            if result:
                report.parity.append((system, dtype, backend, "failed" if code else "passed"))
    return list(dict.fromkeys(backend for _, _, backend, _ in report.parity))


def check_speed(report: Report, folder: Path, backends: list[str]) -> None:
    """The presets `bench` and published ones against PyTorch."""
    for system, definition in SYSTEMS.items():
        for preset in filter(PRESETS.__contains__, definition.presets):
            for backend in backends:
                if plan := plan_of(report, folder, system, preset, TIMED, backend):
                    _time(report, folder, system, preset, backend, plan)
                    (folder / plan).unlink()  # of gigabytes


def _time(report: Report, folder: Path, system: str, preset: str, backend: str, plan: str) -> None:
    for baselines in BASELINES:
        arguments = ("--engine", plan, *BENCH, "--baseline", baselines)
        code, result, reason = vqdeploy(folder, "bench", *arguments)
        if not code:
            report.speed += rows_of(result, system, preset, backend)
            return
        report.note(f"bench of {system} {preset} on {backend} against {baselines or 'nothing'}", code, reason)


def rows_of(result: dict[str, Any], *names: str) -> list[tuple[str, ...]]:
    """The lines of what `vqdeploy bench` measured, one a task and batch size."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for entry in result["results"]:
        times.setdefault((entry["task"], entry["batch_size"]), {})[entry["name"]] = entry["median_ms"]
    rows = []
    for (task, batch), medians in times.items():
        plan = medians["vqdeploy"]
        others = [medians.get(name) for name in ("eager", "compile")]
        shown = [f"{other:.1f} ms ({other / plan:.2f})" if other else "not timed" for other in others]
        rows.append((*names, task, str(batch), f"{plan:.1f} ms", *shown))
    return rows


def main() -> int:
    """0 when everything that ran passed, 1 when something failed or no backend ran, 2 without a GPU."""
    found = gpu()
    if not found:
        print("there is no NVIDIA GPU here (nvidia-smi names none): nothing was checked", file=sys.stderr)
        return 2
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        versions = {name: str(value) for name, value in vqdeploy(folder, "env")[1].items()}
        report = Report({"date": today, "commit": commit(), **found, **versions})
        check_tests(report, folder)
        backends = check_parity(report, folder)
        check_speed(report, folder, backends)
    target = ROOT / "docs" / "measurements" / f"{today}-{re.sub('[^a-z0-9]+', '-', found['GPU'].lower())}.md"
    target.parent.mkdir(exist_ok=True)
    with replacing_file(target) as file:
        file.write_text(report.text(), encoding="utf-8")
    print(target)
    return 1 if report.failed or not backends else 0


if __name__ == "__main__":
    sys.exit(main())
