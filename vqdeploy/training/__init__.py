"""Training: a tokenizer, then a prior on its codes, then the checkpoint and what it reaches."""

from vqdeploy.training.run import train

__all__ = ["train"]
