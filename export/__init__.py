"""From checkpoints to ONNX packages."""
