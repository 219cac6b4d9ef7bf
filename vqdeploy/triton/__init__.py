"""Plans as models of NVIDIA's Triton Inference Server."""

PLAN = "model.plan"
"""File name of the plan, or of an engine, in the folder of a version of a model."""
