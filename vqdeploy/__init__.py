"""Take a vector-quantized image generator from PyTorch to one deployable file, and run it without PyTorch."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqdeploy.checkpoint import load

__version__ = version("vqdeploy")
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Loads PyTorch only when a checkpoint is asked for."""
    if name == "load":
        return import_module("vqdeploy.checkpoint").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
