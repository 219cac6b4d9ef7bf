"""The libraries of TensorRT, for builder and runtime; importing this loads none."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module."""

SOURCES = {"tensorrt": "from NVIDIA's TensorRT download", "tensorrt-rtx": "from PyPI"}
"""Backend -> where to get its library, for error messages."""
