"""Take a vector-quantized image generator from PyTorch to one deployable file."""
