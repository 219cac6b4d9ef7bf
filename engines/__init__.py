"""From an ONNX package to a plan, one module a backend."""
