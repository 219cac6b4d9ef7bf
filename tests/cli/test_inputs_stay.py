"""No verb replaces what it reads."""

import os
import re
import shutil

import pytest
from PIL import Image
from support.imports import ROOT

from vqdeploy import bench


@pytest.fixture
def own(plan, tmp_path):
    """A copy of a plan, and an image."""
    shutil.copy(plan, tmp_path / "a.plan")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "in.png")
    (tmp_path / "d").mkdir()
    shutil.copy(tmp_path / "in.png", tmp_path / "d" / "1.png")
    shutil.copy(tmp_path / "in.png", tmp_path / "rqvae-reconstruct.png")
    (tmp_path / "link.png").symlink_to("in.png")
    shutil.copy(tmp_path / "a.plan", tmp_path / "plan.png")
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        "run --engine a.plan --num-images 1 --label cat -o a.plan",
        "run --engine a.plan --num-images 1 --label cat -o d/../a.plan",
        "run --engine plan.png --num-images 1 --label cat --film plan.png",
        "run --engine a.plan --task reconstruct --input in.png -o in.png",
        "run --engine a.plan --task reconstruct --input in.png -o link.png",
        "run --engine a.plan --task reconstruct --input link.png -o in.png",
        "run --engine a.plan --task reconstruct --input d -o d/1.png",
        "run --engine a.plan --task reconstruct --input rqvae-reconstruct.png",
        "run --engine a.plan --task inpaint --input d/1.png --label cat --mask in.png -o in.png",
        "bench --engine plan.png --plot plan.png",
        "bench --engine a.plan --compare plan.png --plot plan.png",
        "bench --engine a.plan --plot a.plan",
        "bench --engine a.plan --plot times.pdf",
    ],
)
def test_an_input_is_not_replaced(vqdeploy, own, arguments):
    before = contents(own)
    code, _, err = vqdeploy(*arguments.split())
    assert code == 2
    assert "is the input" in err or "as a PNG" in err
    assert contents(own) == before


def test_a_plan_is_not_written_into_its_package(vqdeploy, package, tmp_path):
    shutil.copytree(package, tmp_path / "package")
    (tmp_path / "link").symlink_to("package")
    before = contents(tmp_path)
    for output in ("package/manifest.json", "package/new.plan", "link/manifest.json", "package/sub/new.plan"):
        code, _, err = vqdeploy("build", "package", "-o", output)
        assert code == 2
        assert "lies in the package" in err
    assert contents(tmp_path) == before


def test_subprocesses_run_no_file_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert bench._measure_apart("TASKS.__len__()", threads=1) == 3
    assert os.listdir(tmp_path) == ["numpy.py"]
    sources = [file for part in ("vqdeploy", "runtime", "export", "engines") for file in (ROOT / part).rglob("*.py")]
    calls = [call for file in sources for call in re.findall(r"\[sys\.executable, .*", file.read_text())]
    assert calls
    assert all(call.startswith('[sys.executable, "-P"') for call in calls)
