"""Which part may import which, by the sources: at import time, and inside functions."""

import pytest
from support.imports import Import, imports, modules

BASE = {"errors", "files", "config", "precision", "options", "machine", "processes", "threads"}
"""Standard library only: everyone may import them."""

EDGES: dict[str, set[str]] = {
    **{name: set() for name in sorted(BASE)},
    "kernels": set(),
    "models": set(),
    "systems": {"models"},
    "checkpoint": {"systems"},
    "reference": {"models", "systems"},
    "training": {"models", "systems", "checkpoint", "reference", "images"},
    "shards": set(),  # needs pyarrow
    "triton": {"runtime", "manifest"},
    "tokenize": {"shards", "runtime", "manifest", "images"},
    "convert": {"models", "systems", "checkpoint"},
    "manifest": set(),
    "graphs": {"manifest"},
    "backends": {"manifest"},
    "images": set(),
    "runtime": {"manifest", "graphs", "backends", "images"},
    "export": {"models", "systems", "checkpoint", "reference", "manifest", "graphs"},
    "engines": {"manifest", "graphs", "backends"},
    "verify": {"models", "systems", "checkpoint", "reference", "export", "manifest", "runtime"},
    "bench": {"models", "checkpoint", "reference", "export", "manifest", "backends", "runtime"},
    "tasks": {"runtime", "images"},
    "serve": {"runtime", "images"},
    "cli": set(),
    "vqdeploy": set(),
}
"""What each part may import at import time, `BASE` and itself aside; `FILES` gives the parts smaller than a folder."""

INSIDE_FUNCTIONS: dict[str, set[str]] = {
    "cli": set(EDGES),  # each verb loads what it needs
    "vqdeploy": {"runtime"},  # `vqdeploy.load` loads nothing before it is called
    "models": {"kernels"},  # the operators that take CUDA tensors
    "export": {"verify"},  # a module of the user's is compared with its export at once
    "training": {"shards"},  # data that are codes
    "systems": {"export"},  # a system names its stages, and trains without ONNX
    "backends": {"runtime"},  # a backend's library is imported on use
    "verify": {"engines"},  # a package is verified as a plan
    "engines": {"runtime", "kernels"},  # TensorRT builds for the GPU that is there, with plugins
}
"""What it may import later: in functions, by a name in a string, and for type checkers."""

FILES = {
    "vqdeploy": "vqdeploy",
    "vqdeploy.__main__": "cli",
    "vqdeploy.cli.tasks": "tasks",  # what `vqdeploy run` does
    "vqdeploy.runtime.manifest": "manifest",  # what stands between export, engines and runtime, and the file of a plan
    "vqdeploy.runtime.bundle": "manifest",
    "vqdeploy.runtime.graphs": "graphs",  # which graphs are let through
    "vqdeploy.runtime.onnx_file": "graphs",
    "vqdeploy.runtime.operators": "graphs",
    "vqdeploy.runtime.rules": "graphs",
    "vqdeploy.runtime.backends": "backends",  # their names, and what each has to bring
    "vqdeploy.runtime.session": "backends",
    "vqdeploy.runtime.tensorrt_library": "backends",
    "vqdeploy.runtime.images": "images",
    "vqdeploy.runtime.folder": "images",
    "vqdeploy.runtime.threads": "threads",
}
"""Modules that are no part of their folder's part."""


def part(module: str) -> str:
    return FILES.get(module) or module.split(".")[1]


def allowed(edge: Import) -> bool:
    source, target = part(edge.source), part(edge.target)
    late = INSIDE_FUNCTIONS.get(source, set()) if edge.late else set()
    return target in {source, *BASE, *EDGES[source], *late}


def test_every_module_is_in_the_table():
    assert {part(name) for name in modules()} <= set(EDGES)


@pytest.mark.parametrize("name", list(EDGES))
def test_a_part_imports_what_it_may(name):
    wrong = [edge for edge in imports() if part(edge.source) == name and not allowed(edge)]
    assert not wrong, "\n".join(f"{modules()[edge.source]}:{edge.line} imports {edge.target}" for edge in wrong)


def test_imports_are_found():
    """In functions, as modules and as names of modules."""
    found = {(edge.source, edge.target, edge.late) for edge in imports()}
    assert ("vqdeploy.engines.build", "vqdeploy.runtime.bundle", False) in found
    assert ("vqdeploy.engines.build", "vqdeploy.engines.package", False) in found
    assert ("vqdeploy.engines.tensorrt", "vqdeploy.runtime.device", True) in found
    assert ("vqdeploy.runtime.backends", "vqdeploy.runtime.tensorrt", True) in found
