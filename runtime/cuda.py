"""Whether a plan for ONNX Runtime runs on CUDA here, and what is missing if not."""

import contextlib
import ctypes
import io
import logging

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.onnxrt import INSTALL_CUDA, ort

log = logging.getLogger("vqdeploy")


def available() -> bool:
    """Whether ONNX Runtime can run on CUDA; a GPU that lies idle for want of a package is worth a warning."""
    try:
        check()
    except VqdeployError as error:
        if "CUDAExecutionProvider" in ort.get_available_providers():
            log.warning("running on the CPU: %s", error)
        return False
    return True


def check() -> None:
    """Loads the libraries that CUDA needs, as ONNX Runtime itself tells of a missing one in its log alone.

    Raises:
        VqdeployError: A package, the driver or the GPU is missing.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise VqdeployError(
            "this ONNX Runtime has no CUDA",
            expected="the package onnxruntime-gpu, and onnxruntime not beside it",
            found=f"onnxruntime {ort.__version__} for {', '.join(ort.get_available_providers())}",
            fix=INSTALL_CUDA,
        )
    _check_driver(int(ort.cuda_version.split(".")[0]))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    for library, package in _libraries(ort.cuda_version).items():
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise VqdeployError(
                f"ONNX Runtime on CUDA needs {library} of {package}, which cannot be loaded ({error})",
                fix='pip install "onnxruntime-gpu[cuda,cudnn]"',
            ) from error


def _check_driver(cuda: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise VqdeployError("there is no NVIDIA driver here", expected="libcuda.so.1", found="none") from error
    count, version = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise VqdeployError("no NVIDIA GPU answers", expected="one or more", found=f"{count.value} (status {status})")
    driver.cuDriverGetVersion(ctypes.byref(version))  # 1000 * major + 10 * minor
    if version.value < 1000 * cuda:
        found = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
        raise VqdeployError("the NVIDIA driver is too old", expected=f"one for CUDA {cuda}", found=found)


def _libraries(cuda: str) -> dict[str, str]:
    """What ONNX Runtime loads, and the package of each, by the version of CUDA that it was built for."""
    major = cuda.split(".")[0]
    suffix = f"-cu{major}" if int(major) < 13 else ""
    return {
        f"libcudart.so.{major}": f"nvidia-cuda-runtime{suffix}",
        f"libcublasLt.so.{major}": f"nvidia-cublas{suffix}",
        f"libcublas.so.{major}": f"nvidia-cublas{suffix}",
        "libcurand.so.10": f"nvidia-curand{suffix}",
        "libcudnn.so.9": f"nvidia-cudnn-cu{major}",
    }
