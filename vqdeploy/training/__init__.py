"""Training: a tokenizer, then a prior on its codes, then the checkpoint and what it reaches."""

from vqdeploy.training.recipe import Recipe, recipe
from vqdeploy.training.run import train

__all__ = ["Recipe", "recipe", "train"]
