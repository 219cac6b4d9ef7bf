"""Weights of public implementations in our layout, one file a code base."""
