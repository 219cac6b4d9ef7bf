"""Training: a tokenizer, then a prior on its codes, then metrics and the checkpoint."""

from vqdeploy.training.run import train

__all__ = ["train"]
