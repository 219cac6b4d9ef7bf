"""Which part may import which, in fresh processes."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vqdeploy
from vqdeploy import errors
from vqdeploy.runtime import Pipeline

ROOT = Path(__file__).parents[1]
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
"""
HEAVY = ("torch", "onnx", "onnxscript", "onnx_ir", "lightning", "matplotlib", "scipy", "sklearn")
LOADED = "import sys, json; print(json.dumps(sorted(sys.modules)))"


def loaded(python, statement):
    """Names of all modules that a statement loads."""
    return set(json.loads(python(f"{statement}\n{LOADED}").splitlines()[-1]))


def roots(modules):
    return {name.split(".")[0] for name in modules}


def test_the_runtime_needs_no_torch_and_no_onnx(python):
    script = BLOCK.format(blocked=HEAVY) + "import vqdeploy.runtime; print('fine')"
    assert python(script) == "fine\n"


def test_the_runtime_loads_no_models_and_no_engine_before_a_plan(python):
    modules = loaded(python, "import vqdeploy.runtime")
    assert not [name for name in modules if name.startswith(("vqdeploy.models", "vqdeploy.export", "vqdeploy.engines"))]
    assert not roots(modules) & {*HEAVY, "onnxruntime"}


def test_a_plan_runs_without_torch_and_onnx(python, plan, pipeline):
    script = BLOCK.format(blocked=HEAVY) + (
        "import numpy as np\n"
        "from vqdeploy.runtime import load\n"
        "pipe = load(sys.argv[1])\n"
        "out = pipe.generate([0, 2], seed=3)\n"
        "codes = pipe.encode(out.images)\n"
        "assert (pipe.decode(codes) == pipe.reconstruct(out.images)).all()\n"
        "print(pipe.inpaint(out.images, [0, 2], mask_ratio=0.5).codes.shape, out.codes.sum())\n"
    )
    expected = pipeline.generate([0, 2], seed=3).codes.sum()
    assert python(script, plan) == f"(2, 4, 4, 4) {expected}\n"


def test_the_run_command_needs_no_torch_and_no_onnx(python, plan, tmp_path):
    script = BLOCK.format(blocked=HEAVY) + (
        "from vqdeploy.cli import main\n"
        "sys.argv = ['vqdeploy', 'run', '--engine', sys.argv[1], '--num-images', '1', '-o', 'out.png']\n"
        "main()\n"
    )
    python(script, plan, cwd=tmp_path)
    assert (tmp_path / "out.png").exists()


def test_a_server_needs_no_torch_and_no_onnx(python):
    assert python(BLOCK.format(blocked=HEAVY) + "import vqdeploy.serve.server; print('fine')") == "fine\n"


def test_the_package_itself_loads_almost_nothing(python):
    modules = loaded(python, "import vqdeploy; vqdeploy.__version__")
    assert not roots(modules) & {*HEAVY, "numpy", "onnxruntime"}


def test_the_package_offers_load_of_plans(python):
    modules = loaded(python, "import vqdeploy; vqdeploy.load")
    assert "numpy" in roots(modules)
    assert not roots(modules) & {*HEAVY, "onnxruntime"}


def test_load_opens_a_plan(plan):
    assert isinstance(vqdeploy.load(plan, threads=1), Pipeline)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["export", "--help"], ["--version"], []])
def test_help_loads_no_library(python, arguments):
    script = (
        "import sys\n"
        f"sys.argv = ['vqdeploy', *{arguments!r}]\n"
        "from vqdeploy.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
    )
    assert not roots(loaded(python, script)) & {*HEAVY, "numpy", "onnxruntime"}


def test_env_loads_no_large_library(python):
    modules = loaded(
        python, "import sys\nsys.argv = ['vqdeploy', 'env']\nfrom vqdeploy.cli import app\napp(standalone_mode=False)"
    )
    assert not roots(modules) & {*HEAVY, "onnxruntime"}


def test_inspect_opens_no_engine(python, plan):
    script = (
        "import sys\n"
        f"sys.argv = ['vqdeploy', 'inspect', {str(plan)!r}]\n"
        "from vqdeploy.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
    )
    assert not roots(loaded(python, script)) & {*HEAVY, "onnxruntime"}


def test_building_needs_no_torch_and_no_triton(python, package, tmp_path):
    script = BLOCK.format(blocked=("torch", "triton")) + (
        "from pathlib import Path\nfrom vqdeploy.engines.build import build\nbuild(Path(sys.argv[1]), Path('a.plan'))\n"
    )
    python(script, package, cwd=tmp_path)
    assert (tmp_path / "a.plan").exists()


def test_the_models_need_no_export_engines_or_runtime(python):
    modules = loaded(python, "import vqdeploy.models, vqdeploy.systems, vqdeploy.checkpoint")
    parts = ("vqdeploy.export", "vqdeploy.engines", "vqdeploy.runtime")
    assert not [name for name in modules if name.startswith(parts)]
    assert not roots(modules) & {"onnx", "onnxscript", "onnxruntime"}


def test_the_export_needs_no_builder(python):
    modules = loaded(python, "import vqdeploy.export.package")
    assert not [name for name in modules if name.startswith("vqdeploy.engines")]


@pytest.mark.parametrize(("module", "extra"), [("torch", "export,train"), ("onnxruntime", "onnxrt")])
def test_a_missing_library_is_mended_by_an_extra(python, module, extra, plan, tmp_path):
    verb = ["models"] if module == "torch" else ["run", "--engine", str(plan)]
    script = BLOCK.format(blocked=(module,)) + (
        "import io, contextlib\n"
        f"sys.argv = ['vqdeploy', *{verb!r}]\n"
        "from vqdeploy.cli import main\n"
        "errors = io.StringIO()\n"
        "with contextlib.redirect_stderr(errors):\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "print(code, errors.getvalue())\n"
    )
    printed = python(script, cwd=tmp_path)
    assert printed.startswith("2 error: ")
    assert f'pip install "vqdeploy[{extra}]"' in printed


def test_every_extra_that_an_error_names_brings_its_package():
    names = {
        "google": "protobuf",
        "grpc": "grpcio",
        "multipart": "python-multipart",
        "yaml": "pyyaml",
        "cuda": "cuda-bindings",
        "onnx_ir": "onnx-ir",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, named in errors._EXTRAS.items():
        package = names.get(module, module.replace("_", "-"))
        for extra in named.split(","):
            assert any(re.match(rf"{package}\b", line) for line in extras[extra]), (package, extra)


def test_the_telemetry_of_onnx_runtime_is_off(plan, tmp_path):
    """Its makers get no report and no identifier of this device is written, unless the user says so."""
    (tmp_path / "home").mkdir()
    hidden = (
        "CI",
        "GITHUB_ACTIONS",
        "ORT_DISABLE_TELEMETRY",
        "XDG_CACHE_HOME",
    )  # off too, or elsewhere
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    script = "import sys, vqdeploy; vqdeploy.load(sys.argv[1], verify=False).generate([0])"
    command = [sys.executable, "-c", script, plan]
    subprocess.run(command, env=environment | {"HOME": str(tmp_path / "home")}, check=True)  # noqa: S603
    assert list((tmp_path / "home").rglob("*")) == []


@pytest.mark.slow
def test_the_wheel_installs_one_package(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed, and without it no wheel is built offline")
    sources = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so the sources cannot be told from other files")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "-w", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vqdeploy"}
    for folder in ("", "models", "training", "export", "engines", "runtime"):
        inside = ROOT / "vqdeploy" / folder if folder in ("", "models", "training") else ROOT / folder
        modules = {f"vqdeploy/{folder}/{file.name}".replace("//", "/") for file in inside.glob("*.py")}
        assert modules
        assert modules <= set(names)
    assert {"vqdeploy/py.typed", "vqdeploy/serve/page/index.html"} <= set(names)
