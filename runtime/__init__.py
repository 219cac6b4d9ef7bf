"""Runs plans, with numpy and one engine library, and never PyTorch."""

from vqdeploy.runtime.pipeline import Output, Pipeline, Step, load

__all__ = ["Output", "Pipeline", "Step", "load"]
