"""Systems: what is behind one value of `--model`."""

from vqdeploy.systems.system import System, SystemConfig, create

__all__ = ["System", "SystemConfig", "create"]
