"""`vqdeploy env`."""

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish
from vqdeploy.errors import VqdeployError, shown

_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ORT_DISABLE_TELEMETRY",
    "PYTHONIOENCODING",
    "TRITON_INTERPRET",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
)
"""Environment variables that affect vqdeploy."""


def env(as_json: Json = False) -> None:
    """Show versions and devices, for bug reports."""
    import os
    import platform
    import sys

    from vqdeploy import machine
    from vqdeploy.runtime.threads import cores

    memory = machine.memory_mb()
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": machine.cpu(),
        "cores": cores(),
        "memory_mb": None if memory is None else round(memory),
        "gpu": _gpu(),
        "stdout": getattr(sys.stdout, "encoding", None),
        **machine.versions(),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    finish(facts, as_json, "\n".join(f"{name:24} {shown(value)}" for name, value in facts.items()))


def _gpu() -> str:
    """Compute capability of the GPU that plans can use, or why there is none."""
    try:
        from vqdeploy.runtime import device

        device.check()
        return device.compute_capability()
    except VqdeployError as error:
        return str(error).partition(". Fix")[0]
