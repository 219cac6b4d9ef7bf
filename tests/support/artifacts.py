"""Checkpoints, packages and plans of the small systems, made once and kept on disk.

Exports take most of the suite's time. What was made lies in `.pytest_cache/artifacts`, below a digest of everything it
depends on: the sources, the libraries, the system, the precision and the options. Several processes may ask at once:
the first one makes it, the others wait. Graphs of stages are kept too, as packages in several precisions share some.
"""

import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import onnx_ir
import pytest
from filelock import FileLock
from torch import Tensor

from support.imports import ROOT, closure
from support.systems import SYSTEMS
from vqdeploy import checkpoint
from vqdeploy.engines import package
from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.export.package import export
from vqdeploy.export.stage import Stage
from vqdeploy.files import replacing_file
from vqdeploy.runtime import Pipeline, load
from vqdeploy.runtime.bundle import Bundle, sha256
from vqdeploy.systems import System

T = TypeVar("T")

KEPT_DAYS = 3
_TO_ONNX = Stage.to_onnx
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "torch", "vqdeploy")


@cache
def _sources(*modules: str) -> str:
    """A digest of all sources that some modules depend on, and of the libraries."""
    files = {str(file.relative_to(ROOT)): sha256(file) for file in closure(*modules)}
    return _digest([platform.python_version(), *map(version, _LIBRARIES), files])


def _digest(content: object) -> str:
    def plain(value: object) -> object:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    return hashlib.sha256(json.dumps(content, sort_keys=True, default=plain).encode()).hexdigest()[:16]


class Artifacts:
    """What tests share. They change nothing of it: those that need a damaged package or plan copy it first.

    Each method takes the name of one of `SYSTEMS`, or a system.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._memo: dict[tuple, object] = {}

    def system(self, system: str | System) -> System:
        """A system with random weights; do not train it."""
        return self._once(("system", system), SYSTEMS[system]) if isinstance(system, str) else system

    def checkpoint(self, system: str | System) -> Path:
        """Its checkpoint folder."""

        def make(folder: Path) -> None:
            checkpoint.save(self.system(system), folder)

        return self._kept(_name(system), _sources("vqdeploy.checkpoint"), self._identity(system), make, checkpoint.load)

    def package(self, system: str | System, dtype: str = "fp32") -> Path:
        """Its ONNX package."""

        def make(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Stage, "to_onnx", lambda stage, opset: self._graph(stage, opset))
                export(self.system(system), folder, dtype)

        key = [self._identity(system), dtype]
        name = f"{_name(system)}-{dtype}-onnx"
        return self._kept(name, _sources("vqdeploy.export.package"), key, make, package.read)

    def _graph(self, stage: Stage, opset: int) -> onnx_ir.Model:
        """`Stage.to_onnx`."""

        def make(file: Path) -> None:
            with replacing_file(file) as new:
                onnx_ir.save(_TO_ONNX(stage, opset), new)

        content = io.BytesIO()
        _Pickler(content).dump([stage.module.eval(), stage.inputs, stage.outputs, stage.dynamic, opset])
        key = hashlib.sha256(content.getvalue()).hexdigest()
        return onnx_ir.load(self._kept(f"{stage.name}.onnx", _sources("vqdeploy.export.package"), key, make, _exists))

    def plan(self, system: str | System, dtype: str = "fp32", **options: object) -> Path:
        """A plan with these options of `vqdeploy.engines.build.build`."""
        source = self.package(system, dtype)

        def make(file: Path) -> None:
            build(source, file, **options)

        key = [source.parent.name, options]
        name = f"{_name(system)}-{dtype}.plan"
        return self._kept(name, _sources("vqdeploy.engines.build"), key, make, lambda file: Bundle(file).verify())

    def pipeline(self, system: str | System, dtype: str = "fp32", **options: object) -> Pipeline:
        """Such a plan, opened."""
        plan = self.plan(system, dtype, **options)
        return self._once(("pipeline", plan), lambda: load(plan, threads=1))

    def _identity(self, system: str | System) -> str:
        return self._once(("digest", system), lambda: checkpoint.digest(self.system(system)))

    def _once(self, key: tuple, make: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _kept(
        self, name: str, sources: str, key: object, make: Callable[[Path], None], check: Callable[[Path], object]
    ) -> Path:
        """A file or folder in the cache, made if it is not there or fails the check."""
        folder = self._folder / _digest([name, sources, key])
        path = folder / name

        def get() -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                try:
                    check(path)
                except VqdeployError:
                    make(path)
                os.utime(folder)
            return path

        return self._once(("path", path), get)


class _Pickler(pickle.Pickler):
    """A pickler for digests: of a tensor it writes type, shape and numbers, without its address."""

    def reducer_override(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return NotImplemented
        numbers = value.detach().contiguous().numpy()
        return bytes, (f"{numbers.dtype} {numbers.shape}".encode() + numbers.tobytes(),)


def _exists(file: Path) -> None:
    if not file.exists():
        raise VqdeployError(f"there is no {file.name}")


def _name(system: str | System) -> str:
    return system if isinstance(system, str) else f"{system.config.model}-{system.config.preset}"


def remove_old(folder: Path) -> None:
    """Removes what no run has used for some days."""
    for path in folder.glob("*"):
        if path.stat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)
