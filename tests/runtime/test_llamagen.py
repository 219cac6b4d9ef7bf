"""Sampling from LlamaGen's prior: an interval of guidance, and the codes of the public code."""
