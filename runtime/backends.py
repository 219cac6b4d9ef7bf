"""The backends of plans, and where their libraries come from."""

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module, of those with engines of NVIDIA's."""

BACKENDS = ("onnxrt", *LIBRARIES)


def source(backend: str) -> str:
    """Where the library of a backend is to be had."""
    return "from NVIDIA's TensorRT download" if backend == "tensorrt" else "from PyPI"
