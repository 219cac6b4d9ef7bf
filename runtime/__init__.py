"""Runs plans with numpy and one engine library, without PyTorch."""

from vqdeploy.runtime.pipeline import Output, Pipeline, Step, load

__all__ = ["Output", "Pipeline", "Step", "load"]
