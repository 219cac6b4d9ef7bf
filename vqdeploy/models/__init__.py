"""Reference models in PyTorch, and the table of systems."""

from vqdeploy.models.system import System, SystemConfig, create

__all__ = ["System", "SystemConfig", "create"]
