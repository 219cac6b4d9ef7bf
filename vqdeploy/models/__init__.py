"""Reference models in PyTorch, one architecture a file."""
