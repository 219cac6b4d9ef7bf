"""The table of operators that `torch.onnx.export` makes anew for each graph, in a third of a second."""

from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry


def remember_translations() -> None:
    """Makes the table once for each opset; each export still gets one of its own, to which it adds what is custom."""
    make = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = ONNXRegistry()
        registry._opset_version = opset_version
        registry.functions = {op: list(found) for op, found in make(opset_version=opset_version).functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
