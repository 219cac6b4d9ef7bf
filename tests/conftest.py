"""What all tests share. Packages and plans come from `support.artifacts`."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from support.artifacts import Artifacts, remove_old
from support.registry import remember_translations

from vqdeploy import cli, reference
from vqdeploy.runtime import onnxrt
from vqdeploy.runtime.manifest import SizeRange

# Read when Triton is imported: the tests run its kernels on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("suite", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("suite")
# Waiting threads of PyTorch and ONNX Runtime would take the cores from each other, and from other workers of xdist.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for PyTorch in the processes that tests start
onnxrt.cores = reference.cores = lambda: 1
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it

remember_translations()
ARTIFACTS = Path(__file__).parents[1] / ".pytest_cache" / "artifacts"
os.environ["XDG_CACHE_HOME"] = str(ARTIFACTS.with_name("home"))  # tests leave nothing in the user's


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # a worker of xdist
        remove_old(ARTIFACTS)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: an export, which makes many small objects, need not search it for garbage each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def artifacts():
    """Checkpoints, packages, plans and pipelines of the small systems in `support.systems`."""
    return Artifacts(ARTIFACTS)


def _artifact(kind: str, *arguments: str, **options: object):
    """A fixture by a name of its own."""

    @pytest.fixture(scope="session")
    def fixture(artifacts):
        return getattr(artifacts, kind)(*arguments, **options)

    return fixture


system = _artifact("system", "rqvae")
checkpoint_folder = _artifact("checkpoint", "rqvae")
package = _artifact("package", "rqvae")
plan = _artifact("plan", "rqvae")
portable_plan = _artifact("plan", "rqvae", portable=True)
pipeline = _artifact("pipeline", "rqvae")
splitting_pipeline = _artifact("pipeline", "rqvae", batch=SizeRange(1, 1, 2))  # calls of at most two images

text_system = _artifact("system", "text")
text_package = _artifact("package", "text")
text_plan = _artifact("plan", "text")
text_pipeline = _artifact("pipeline", "text")

movq_system = _artifact("system", "movq")
movq_package = _artifact("package", "movq")
movq_plan = _artifact("plan", "movq")
movq_portable_plan = _artifact("plan", "movq", portable=True)
movq_pipeline = _artifact("pipeline", "movq")
movq_splitting_pipeline = _artifact("pipeline", "movq", batch=SizeRange(1, 1, 2))

adaptive_system = _artifact("system", "adaptive")
adaptive_package = _artifact("package", "adaptive")
adaptive_pipeline = _artifact("pipeline", "adaptive")

vit_system = _artifact("system", "vit")
vit_package = _artifact("package", "vit")
vit_plan = _artifact("plan", "vit")
vit_pipeline = _artifact("pipeline", "vit")

vqgan_system = _artifact("system", "vqgan")
vqgan_package = _artifact("package", "vqgan")
vqgan_plan = _artifact("plan", "vqgan", portable=True)
vqgan_pipeline = _artifact("pipeline", "vqgan", portable=True)

llamagen_system = _artifact("system", "llamagen")
llamagen_package = _artifact("package", "llamagen")
llamagen_plan = _artifact("plan", "llamagen")
llamagen_pipeline = _artifact("pipeline", "llamagen")

features_system = _artifact("system", "features")
features_package = _artifact("package", "features")
features_plan = _artifact("plan", "features")
features_pipeline = _artifact("pipeline", "features")

vqvae2_system = _artifact("system", "vqvae2")
vqvae2_checkpoint = _artifact("checkpoint", "vqvae2")
vqvae2_package = _artifact("package", "vqvae2")
vqvae2_plan = _artifact("plan", "vqvae2")
vqvae2_portable_plan = _artifact("plan", "vqvae2", portable=True)
vqvae2_pipeline = _artifact("pipeline", "vqvae2")
vqvae2_splitting_pipeline = _artifact("pipeline", "vqvae2", batch=SizeRange(1, 1, 2))

three_system = _artifact("system", "three")
three_package = _artifact("package", "three")
three_plan = _artifact("plan", "three")
three_pipeline = _artifact("pipeline", "three")

var_system = _artifact("system", "var")
var_package = _artifact("package", "var")
var_plan = _artifact("plan", "var")
var_portable_plan = _artifact("plan", "var", portable=True)
var_pipeline = _artifact("pipeline", "var")

shared_system = _artifact("system", "shared")
shared_package = _artifact("package", "shared")
shared_pipeline = _artifact("pipeline", "shared")

half_package = _artifact("package", "rqvae", "fp16")
text_half_package = _artifact("package", "text", "fp16")
movq_half_package = _artifact("package", "movq", "fp16")
vit_half_package = _artifact("package", "vit", "fp16")
vqgan_half_package = _artifact("package", "vqgan", "fp16")
llamagen_half_package = _artifact("package", "llamagen", "fp16")
vqvae2_half_package = _artifact("package", "vqvae2", "fp16")
var_half_package = _artifact("package", "var", "fp16")


@pytest.fixture(scope="session")
def command():
    """Runs the installed console script: `command("run", "--engine", file, cwd=folder)`."""
    script = Path(sys.executable).with_name("vqdeploy")

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603
            [script, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,  # of what hangs; a busy machine is slow
        )

    run.script = script
    return run


@pytest.fixture(scope="session")
def tiny(command, tmp_path_factory, worker_id):
    """The two commands of the user as typed, with the build between them; nothing but their output is kept.

    They run once, whatever number of processes the tests are spread over.
    """
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder, record = root / "tiny", root / "tiny.json"
    lines = {"export": "export --model rqvae", "build": "build", "run": "run --engine rqvae.plan"}
    with FileLock(root / "tiny.lock"):
        if not record.exists():
            folder.mkdir()
            ended = {name: command(*line.split(), cwd=folder) for name, line in lines.items()}
            fields = ("returncode", "stdout", "stderr")
            record.write_text(json.dumps({n: {f: getattr(e, f) for f in fields} for n, e in ended.items()}))
    steps = {name: SimpleNamespace(**result) for name, result in json.loads(record.read_text()).items()}
    return SimpleNamespace(folder=folder, package=folder / "rqvae-onnx", plan=folder / "rqvae.plan", **steps)


@pytest.fixture
def python():
    """Runs a script in a fresh interpreter and returns what it printed."""

    def run(script: str, *arguments: object, cwd: Path | None = None) -> str:
        process = subprocess.run(  # noqa: S603
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,  # of what hangs; a busy machine is slow
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


@pytest.fixture
def vqdeploy(monkeypatch, capsys, tmp_path):
    """Runs the entry point in process, in an empty folder; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vqdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run
