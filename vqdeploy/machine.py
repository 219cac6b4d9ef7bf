"""Facts about this machine, for `vqdeploy bench` and `vqdeploy env`."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "vqdeploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "cuda-bindings",
    "torch",
    "triton",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "lightning",
    "polygraphy",
    "fastapi",
    "uvicorn",
    "safetensors",
    "pyarrow",
    "ray",
    "pillow",
    "typer",
    "rich",
)

_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def versions() -> dict[str, str]:
    """Versions of the relevant packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, ValueError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those instruction sets of the processor that decide how fast matrix products are; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return [name for name in _FEATURES if name in flags]


def load() -> float | None:
    """Load average of the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory_mb() -> float | None:
    """Memory of the machine in MB of 2^20 bytes; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory_mb() -> float | None:
    """Peak resident set size of this process in MB of 2^20 bytes; None on Windows."""
    try:  # getrusage on Linux includes memory of the parent at the fork
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, else kilobytes
