"""Data sets of images to folders of codes, without PyTorch."""

from vqdeploy.tokenize.part import Done
from vqdeploy.tokenize.run import tokenize

__all__ = ["Done", "tokenize"]
