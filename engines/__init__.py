"""From an ONNX package to a plan, one module per backend."""
