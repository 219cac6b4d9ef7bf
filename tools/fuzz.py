"""Fuzzes vqdeploy: damaged and hostile files and arguments, kills at random times, and a soak test.

    python tools/fuzz.py --cases 20000                  # of all kinds in turn, in processes that may die
    python tools/fuzz.py --kinds "plan graph" --first 7000 --cases 500
    python tools/fuzz.py --kill 40                      # export, build, run and train, killed at random times
    python tools/fuzz.py --soak                       # 2,000 generations and 200 loads in flat memory

It exits with 1 on any fault: a signal, a traceback, a hang, an unprintable message, a partial file. A case is a kind
and a number; `--kinds KIND --first NUMBER --cases 1` reproduces it.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fuzz_cases import KINDS, SYSTEMS, Material, run_case

_MEMORY = 8 << 30  # bytes of address space of a process
_START = 300  # seconds to import everything
_LIFE = 400  # cases per process, against leaks
_WAIT = 10  # seconds on the clock per second of CPU time: a busy machine is not a hang


def prepare(folder: Path, systems: tuple[str, ...]) -> Material:
    """Exports and builds what is not there yet, or of another version."""
    folder.mkdir(parents=True, exist_ok=True)
    for system in systems:
        package, plans = folder / f"{system}-onnx", {"cpu": f"{system}.plan", "cuda": f"{system}-portable.plan"}
        if _damage("export", package) or any(_damage("build", folder / plan) for plan in plans.values()):
            _command("export", "--model", system, "--no-verify", "-o", package)
            for device, plan in plans.items():
                _command("build", package, "--device", device, "-o", folder / plan)
    return Material(folder, systems)


def _command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "vqdeploy", *map(str, arguments)], check=True, capture_output=True)  # noqa: S603


# Cases in processes that may die


def work(material: Material, limit: int) -> None:
    """A process of the pool: reads kinds and numbers, writes outcomes. SIGXCPU ends it when a case goes on too long."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # keep output of libraries away from the parent
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        kind, number = json.loads(line)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit, resource.RLIM_INFINITY))
        with tempfile.TemporaryDirectory(prefix="vq-fuzz-", ignore_cleanup_errors=True) as folder:
            outcome = run_case(kind, number, material, Path(folder))
        print(json.dumps(outcome), file=answers, flush=True)
        gc.collect()


class Worker:
    """A process of the pool, restarted when it dies."""

    def __init__(self, material: Material, limit: int):
        self._material, self._limit = material, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._cases = 0

    def run(self, kind: str, number: int) -> str:
        """The outcome of one case."""
        if self._process is None or self._cases >= _LIFE:
            self.stop()
            systems = ",".join(self._material.systems)
            command = [sys.executable, __file__, "--worker", "--folder", self._material.folder, "--systems", systems]
            command += ["--limit", str(self._limit)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
            self._cases = 0
            if (answer := self._answer(_START)) != "ready":
                self.stop()
                return f"signal: the process did not start ({answer})"
        self._cases += 1
        self._process.stdin.write(json.dumps([kind, number]).encode() + b"\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self._answer(self._limit * _WAIT)

    def _answer(self, wait: int) -> str:
        """The next line of the process, or how it ended."""
        process = self._process
        assert process is not None  # noqa: S101
        if not select.select([process.stdout], [], [], wait)[0]:
            self.stop()
            return f"hang: no end after {wait} s"
        line = process.stdout.readline()  # type: ignore[union-attr]
        if line:
            return str(json.loads(line))
        code = process.wait()
        self._process = None
        if code == -signal.SIGXCPU:
            return f"hang: no end after {self._limit} s of CPU time"
        return f"signal: {signal.Signals(-code).name}" if code < 0 else f"signal: the process ended with {code}"

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fuzz(material: Material, kinds: list[str], first: int, count: int, jobs: int, limit: int) -> bool:
    """Runs cases of all kinds in turn and prints a summary; returns whether there was no fault."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    faults: list[tuple[str, int, str]] = []
    waiting = iter([(kinds[i % len(kinds)], first + i // len(kinds)) for i in range(count)])
    lock = threading.Lock()

    def drive() -> None:
        worker = Worker(material, limit)
        while True:
            with lock:
                case = next(waiting, None)
            if case is None:
                break
            outcome = worker.run(*case)
            with lock:
                outcomes[case[0]][outcome.partition(":")[0]] += 1
                done = sum(map(Counter.total, outcomes.values()))
                if done % 1000 == 0:
                    print(f"{done} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s", flush=True)
                if outcome not in ("ok", "refused"):
                    faults.append((*case, outcome))
                    print(f"{case[0]} {case[1]}: {outcome}", flush=True)
        worker.stop()

    start = time.monotonic()
    threads = [threading.Thread(target=drive) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    columns = ("ok", "refused", "signal", "traceback", "hang", "message", "memory", "exit code")
    print(f"\n| kind | cases | {' | '.join(columns)} |\n|---|{'--:|' * (1 + len(columns))}")
    for kind in kinds:
        found = outcomes[kind]
        print(f"| {kind} | {sum(found.values())} | {' | '.join(str(found[column]) for column in columns)} |")
    ran = sum(map(Counter.total, outcomes.values()))
    print(f"\n{ran} of {count} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return not faults and ran == count


# Kills


def kill(material: Material, count: int, seed: int) -> bool:
    """Kills export, build, run and train at random times, and resumes what was killed of train.

    Returns:
        Whether no partial file was left, and each resumed training had the weights of an uninterrupted one.
    """
    rnd = random.Random(seed)  # noqa: S311
    usual: dict[str, float] = {}
    trained = b""
    faults = []
    for number in range(count):
        verb = ("build", "run", "export", "train")[number % 4]
        sent = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number // 4 % 3]
        with tempfile.TemporaryDirectory(prefix="vq-kill-") as name:
            folder = Path(name)
            line, output = _long_command(verb, material, folder)
            if verb not in usual:
                start = time.monotonic()
                subprocess.run(line, check=True, capture_output=True, cwd=folder)  # noqa: S603
                usual[verb] = time.monotonic() - start
                trained = _weights(output) if verb == "train" else trained
                for left in folder.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            wait = rnd.uniform(0.0, usual[verb] * 1.05)
            process = subprocess.Popen(  # noqa: S603
                line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            process.send_signal(sent)
            said = process.communicate(timeout=120)[1].decode("utf-8", "replace")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # processes that load data outlive a killed parent
            problems = _left_behind(verb, folder, output, sent, said)
            if verb == "train" and not output.exists():
                problems += _resumed(line, folder, output, trained)
            faults += [f"{verb}, {sent.name} after {wait:.2f} s: {problem}" for problem in problems]
            print(f"{verb} {sent.name} {wait:.2f} s: {'; '.join(problems) or 'clean'}", flush=True)
    print(f"\n{count} kills, {len(faults)} faults")
    return not faults


def _weights(checkpoint: Path) -> bytes:
    """The weights of a checkpoint folder as bytes."""
    return (checkpoint / "model.safetensors").read_bytes()


def _resumed(line: list[str], folder: Path, output: Path, expected: bytes) -> list[str]:
    """Problems after a killed training was resumed, or was started anew if it had not begun."""
    again = ["--resume"] if (folder / "out.training").exists() else []
    done = subprocess.run([*line, *again], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        return [f"not resumed: {done.stderr.strip()[-200:]}"]
    return [] if _weights(output) == expected else ["a resumed training has other weights"]


def _long_command(verb: str, material: Material, folder: Path) -> tuple[list[str], Path]:
    """A command that takes a while, and its output."""
    system = material.systems[0]
    words: dict[str, list[object]] = {
        "export": ["export", "--model", system, "--no-verify", "-o", "out"],
        "build": ["build", material.folder / f"{system}-onnx", "-o", "out"],
        "run": ["run", "--engine", material.folder / f"{system}.plan", "--num-images", 8, "-o", "out"],
        "train": ["train", "--model", system, "--steps", 20, "--prior-steps", 20, "--batch-size", 16, "-o", "out"],
    }
    return [sys.executable, "-m", "vqdeploy", *map(str, words[verb])], folder / "out"


def _left_behind(verb: str, folder: Path, output: Path, sent: signal.Signals, said: str) -> list[str]:
    """Problems after a command was killed."""
    problems = []
    if "Traceback" in said and "KeyboardInterrupt" not in said:
        problems.append(f"a traceback: {said.strip().splitlines()[-1][:200]}")
    elif "Traceback" in said:
        problems.append("a traceback of an interrupt")
    others = [
        p.name for p in folder.iterdir() if p != output and not p.name.startswith(".") and p.name != "out.training"
    ]
    hidden = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    if others:
        problems.append(f"left {others[:3]}")
    if hidden and sent != signal.SIGKILL:
        problems.append(f"left {hidden[:3]}")
    if output.exists() and (reason := _damage(verb, output)):
        problems.append(f"half-written: {reason}")
    return problems


def _damage(verb: str, output: Path) -> str:
    """Why an output is unusable; empty if it is usable."""
    from PIL import Image
    from safetensors import safe_open

    from vqdeploy.engines import package
    from vqdeploy.runtime import load

    try:
        if verb == "export":
            package.read(output)
        elif verb == "build":
            load(output).close()
        elif verb == "run":
            with Image.open(output) as picture:
                picture.load()
        else:
            for file in output.glob("*.safetensors"):
                with safe_open(file, "numpy"):
                    pass
            for file in output.glob("*.json"):
                json.loads(file.read_text())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


# Soak


def soak(material: Material, generations: int, loads: int) -> bool:
    """Generates and loads many times; returns whether memory and file handles stay flat."""
    from vqdeploy.runtime import load

    flat = True
    for system in material.systems:
        plan = material.folder / f"{system}.plan"

        def once(plan: Path = plan) -> None:
            with load(plan, device="cpu", threads=1) as pipeline:
                options = {"steps": 2} if "steps" in pipeline.sampling.options else {}
                pipeline.generate([0], **options)

        flat &= _is_flat(f"{system}: loads and closes", once, loads // len(material.systems))
        with load(plan, device="cpu", threads=1) as pipeline:
            options = {"steps": 2} if "steps" in pipeline.sampling.options else {}
            numbers = iter(range(10**9))
            flat &= _is_flat(
                f"{system}: generations",
                lambda: pipeline.generate([0] * (1 + next(numbers) % 3), seed=next(numbers), **options),  # noqa: B023
                generations // len(material.systems),
            )
    return flat


def _is_flat(what: str, once: Any, count: int) -> bool:
    """Whether the second half of many calls adds neither memory nor handles."""
    sizes = []
    for number in range(count):
        once()
        if number in (count // 2, count - 1):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))))
    (memory, handles), (memory_after, handles_after) = sizes
    print(f"{what}, {count}: {memory:.1f} MiB, {handles} handles; at the end {memory_after:.1f} MiB, {handles_after}")
    return memory_after - memory < max(8, 0.02 * memory) and handles_after <= handles


def main() -> int:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=120, help="seconds of CPU time that a case may take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / f"vq-fuzz-material-{os.getuid()}")
    parser.add_argument("--kill", type=int, default=0, metavar="COUNT")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    systems = tuple(given.systems.split(","))
    if given.worker:
        work(Material(given.folder, systems), given.limit)
        return 0
    material = prepare(given.folder, systems)
    if given.kill:
        return int(not kill(material, given.kill, given.first))
    if given.soak:
        return int(not soak(material, 2000, 200))
    return int(not fuzz(material, given.kinds.split(","), given.first, given.cases, given.jobs, given.limit))


if __name__ == "__main__":
    sys.exit(main())
