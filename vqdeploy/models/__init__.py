"""Reference models in PyTorch, one architecture per file."""
