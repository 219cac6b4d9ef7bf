"""Plays TensorRT's builder to our plugins, as far as its Python bindings go, and prints what the plugins answer.

The bindings load with libraries of TensorRT-RTX in place of TensorRT's, which suffice for the registry of plugins.
Symbolic shapes come from the builder, so here stand plain numbers and names of the same kind.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import tensorrt_bindings

sys.modules["tensorrt"] = tensorrt_bindings  # the package of that name only loads TensorRT's libraries

import tensorrt as trt  # noqa: E402
import tensorrt.plugin as trtp  # noqa: E402

from vqdeploy.engines import plugin  # noqa: E402

TYPES = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}


class Expression:
    """A number, or text that stands for one."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return isinstance(self.value, int)

    def get_constant_value(self):
        return self.value


class Builder:
    """What makes expressions."""

    def constant(self, value):
        return Expression(value)

    def operation(self, operation, first, second):
        if operation.name == "SUM" and second.value == 0:
            return first
        return Expression(f"{operation.name}({first.value}, {second.value})")


def tensor(kind):
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.type = kind
    desc.desc.format = trt.TensorFormat.LINEAR
    return desc


def play(name, attributes, kinds, dim, books=()):
    """What the builder asks of one node, in its order."""
    creator = trt.get_plugin_registry().get_creator(name, "1", "vqdeploy")
    fields = trt.PluginFieldCollection([trt.PluginField(key, *value) for key, value in attributes.items()])
    node = creator.create_plugin(
        name, "vqdeploy", fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.UNKNOWN
    )
    types = [TYPES[kind] for kind in kinds]
    types += node.get_output_data_types(types, [2, 2 + len(books)])
    shapes = [[Expression(size) for size in shape] for shape in (("n", dim), (*books, 1000, dim))]
    outputs = node.get_output_shapes(shapes, [], Builder())
    tensors = [tensor(kind) for kind in types]
    supported = node.get_supported_format_combinations(tensors, 2)
    node.configure_plugin(tensors[:2], tensors[2:])
    answer = {
        "types": [kind.name for kind in types],
        "supported": [desc.type.name for desc in supported],
        "shapes": [[expression.value for expression in shape] for shape in outputs],
        "tactics": {},
    }
    for tactic in node.get_valid_tactics():
        node.set_tactic(tactic)
        launch, scalars = SimpleNamespace(), {}
        setter = type("Setter", (dict,), {})(scalars)
        node.get_launch_params(None, tensors, 2, launch, setter, Builder())
        kernel, ptx = node.get_kernel([desc.desc for desc in tensors[:2]], [desc.desc for desc in tensors[2:]])
        answer["tactics"][tactic] = {
            "launch": {key: value.expr.value for key, value in vars(launch).items()},
            "scalars": [setter[i].expr.value for i in range(setter.nbSymExprs)],
            "kernel": kernel,
            "ptx": ptx.decode(),
        }
    return answer


def main():
    plugin.register()
    trt.IDimensionExpr = Expression
    trt.DimsExprs = lambda length: [None] * length
    trtp._tensor.SymExprImpl = lambda symbol: SimpleNamespace(expr=symbol._expr)
    cosine, l2, dot = ({"metric": (name, trt.PluginFieldType.CHAR)} for name in (b"cosine", b"l2", b"dot"))
    depth = {"depth": (np.array([4]), trt.PluginFieldType.INT64)}
    answers = [
        play("VQNearest", cosine, ("fp16", "fp32"), 16),
        play("VQResidual", depth | l2, ("bf16", "bf16"), 64),
        play("VQResidual", depth | dot, ("fp16", "fp32"), 32, books=(4,)),
    ]
    print(json.dumps(answers))  # noqa: T201


if __name__ == "__main__":
    main()
