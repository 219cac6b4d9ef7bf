"""Checks graphs against a table of allowed operators, before an engine library sees the bytes.

ONNX Runtime and TensorRT do not validate a graph fully: some nodes that no exporter writes crash the process or never
return. So a graph may contain only the operators of `vqdeploy.runtime.operators`, with the attributes listed there.
Model-local functions are checked too, with the attributes of each call.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn, Protocol

import numpy as np

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.manifest import WEIGHTS
from vqdeploy.runtime.onnx_file import Message, read
from vqdeploy.runtime.operators import OPERATORS, OPSETS
from vqdeploy.runtime.rules import Operator

FUNCTIONS = "vqdeploy"
"""The domain of the model-local functions that a graph may have."""

NODES = 20_000
"""Most nodes of a graph; those inside functions count at each call."""

BYTES = 1 << 26
"""Most bytes of a graph, without its weights, which have a file of their own."""

LOOP = "ca58c2791056729e3a6ee2f08a6b5f5bf0d55d24bdde09917f5ed958b2226586"
"""Digest of the only function that may contain a Loop: `SearchByRows` of `vqdeploy.engines.bodies_onnxrt`."""

_CALLS = 8  # nesting of functions
_BRANCHES = 4  # nesting of conditions
_RANK = 8
_NAME = 1024  # characters
_FEW = 64  # elements of a constant that are kept for the checks
_IR_VERSIONS = range(10, 14)
_ATTRIBUTES = {1: "FLOAT", 2: "INT", 3: "STRING", 4: "TENSOR", 5: "GRAPH", 6: "FLOATS", 7: "INTS"}
_FIELDS = {"FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t", "GRAPH": "g", "FLOATS": "floats", "INTS": "ints"}
_DTYPES: dict[str, tuple[int, np.dtype]] = {
    "FLOAT": (1, np.dtype("<f4")),
    "UINT8": (2, np.dtype("u1")),
    "INT8": (3, np.dtype("i1")),
    "INT32": (6, np.dtype("<i4")),
    "INT64": (7, np.dtype("<i8")),
    "BOOL": (9, np.dtype("?")),
    "FLOAT16": (10, np.dtype("<f2")),
    "DOUBLE": (11, np.dtype("<f8")),
}
_NUMPY = dict(_DTYPES.values())
_NUMBERS = {name: number for name, (number, _) in _DTYPES.items()}
_FLOAT = _NUMBERS["FLOAT"]
_FLOATS = {_NUMBERS[name] for name in ("FLOAT", "FLOAT16", "DOUBLE")} | {16}  # 16 is bfloat16
_EXTERNAL = 1


@dataclass(frozen=True)
class Known:
    """What is known of a value statically: its ONNX element type, and its elements if they are few.

    A constant depends on no graph input, so that an engine may fold it while it loads the graph. `positive` is the
    maximum of values with a positive constant among them.
    """

    dtype: int | None = None
    numbers: tuple[int, ...] | None = None
    constant: bool = False
    positive: bool = False


Values = dict[str, Known]


class Shaped(Protocol):
    """A tensor, or the static information about one."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""


Weights = Mapping[str, Shaped]
_ANYTHING = Known()


def check(graph: bytes | memoryview, weights: Weights) -> None:
    """Checks that an engine may open a graph.

    Args:
        graph: An ONNX file.
        weights: The tensors that it may read from the weights file.

    Raises:
        ArtifactError: The graph has an operator that is not in the table, is too large, or is malformed.
    """
    if len(graph) > BYTES:
        _refuse(f"it has more than {BYTES} bytes, weights aside")
    _Checker(read(graph), weights).run()


def _refuse(reason: str) -> NoReturn:
    raise ArtifactError(f"the graph is refused: {reason}")


def _shown(name: object) -> str:
    return ascii(name)[:80]


@cache
def _parameters(text: str) -> tuple[list[str], int, bool]:
    """The names or types of inputs or outputs, how many are required, and whether the last one is variadic."""
    parts = text.split()
    needed = max((index + 1 for index, part in enumerate(parts) if "?" not in part), default=0)
    return parts, needed, bool(parts) and "*" in parts[-1]


@dataclass
class _Checker:
    model: Message
    weights: Weights
    functions: dict[str, Message] = field(default_factory=dict)
    memo: dict[Any, tuple[int, list[Known]]] = field(default_factory=dict)

    def run(self) -> None:
        model = self.model
        if model["ir_version"] not in _IR_VERSIONS or model["graph"] is None:
            _refuse(f"its version is {model['ir_version']}; expected {_IR_VERSIONS.start} or a newer one that is known")
        self._imports(model["opset_import"])
        for function in model["functions"]:
            name = function["name"]
            if function["domain"] != FUNCTIONS or function["overload"] or not name or name in self.functions:
                _refuse(f"the function {_shown(name)} of domain {_shown(function['domain'])} has a forbidden name")
            self._imports(function["opset_import"])
            self.functions[name] = function
        self._graph(model["graph"], {}, {}, 0, 0)
        if idle := sorted(set(self.functions) - {name for name, *_ in self.memo}):
            _refuse(f"it never calls its function {_shown(idle[0])}")

    def _imports(self, imports: list[Message]) -> None:
        domains = [entry["domain"] or "" for entry in imports]
        for domain, entry in zip(domains, imports, strict=True):
            if domain != FUNCTIONS and entry["version"] not in OPSETS.get(domain, ()):
                _refuse(f"unsupported opset {entry['version']} of domain {_shown(domain)}")
        if len(set(domains)) != len(domains):
            _refuse("a domain is imported twice")

    # Graphs and tensors

    def _graph(
        self, graph: Message, outer: Values, attributes: dict[str, Message], calls: int, branches: int
    ) -> tuple[int, list[Known]]:
        """The number of nodes of a graph, and the static information about its outputs."""
        if branches > _BRANCHES:
            _refuse("its conditions are nested too deeply")
        values = dict(outer)
        for info in (*graph["input"], *graph["output"], *graph["value_info"]):
            self._value_info(info)
        for info in graph["input"]:
            values[info["name"]] = Known(info["type"]["tensor_type"]["elem_type"] if info["type"] else None)
        for tensor in graph["initializer"]:
            if not tensor["name"]:
                _refuse("a tensor has no name")
            values[tensor["name"]] = self._tensor(tensor, tensor["name"])
        count = self._nodes(graph["node"], values, attributes, calls, branches)
        return count, [values.get(info["name"], _ANYTHING) for info in graph["output"]]

    def _value_info(self, info: Message) -> None:
        kind = info["type"] and info["type"]["tensor_type"]
        if info["type"] is not None and kind is None:
            _refuse(f"{_shown(info['name'])} is not a tensor")
        dims = kind["shape"]["dim"] if kind and kind["shape"] else []
        if len(dims) > _RANK or any(dim["dim_value"] is not None and dim["dim_value"] < 0 for dim in dims):
            _refuse(f"the shape of {_shown(info['name'])} is malformed")

    def _tensor(self, tensor: Message, name: str) -> Known:
        """The static information about a tensor, after checking its number of bytes against its shape."""
        dtype, dims = tensor["data_type"], tensor["dims"]
        if len(dims) > _RANK or any(size < 0 for size in dims):
            _refuse(f"the shape of {_shown(name)} is malformed")
        size = math.prod(dims)
        if tensor["data_location"] == _EXTERNAL or tensor["external_data"]:
            entries = {entry["key"]: entry["value"] for entry in tensor["external_data"]}
            weight = self.weights.get(name)
            if weight is None or entries.get("location") != WEIGHTS:
                _refuse(f"{_shown(name)} is stored in another file than the weights")
            if list(weight.shape) != dims or _NUMPY.get(dtype) != weight.dtype or len(tensor["raw_data"] or b""):
                _refuse(f"{_shown(name)} is not the tensor in the file of weights")
            return Known(dtype, constant=True)
        if tensor["data_location"]:
            _refuse(f"{_shown(name)} has an unsupported data location")
        lists = [values for key in ("float_data", "int32_data", "int64_data", "double_data") if (values := tensor[key])]
        raw = tensor["raw_data"]
        if dtype not in _NUMPY or len(lists) + (raw is not None) > 1:
            _refuse(f"{_shown(name)} has a type that is not supported")
        if (len(lists[0]) if lists else len(raw or b"") / _NUMPY[dtype].itemsize) != size:
            _refuse(f"{_shown(name)} does not have as many numbers as its shape says")
        if dtype not in (_NUMBERS["INT32"], _NUMBERS["INT64"]) or size > _FEW:
            return Known(dtype, constant=True)
        numbers = lists[0] if lists else np.frombuffer(raw or b"", _NUMPY[dtype]).tolist()
        return Known(dtype, tuple(numbers), constant=True)

    # Nodes

    def _nodes(self, nodes: list[Message], values: Values, bound: dict[str, Message], calls: int, branches: int) -> int:
        count = len(nodes)
        if count > NODES:
            _refuse(f"it has more than {NODES} nodes")
        for node in nodes:
            if any(len(name) > _NAME for name in (*node["input"], *node["output"], node["name"] or "")):
                _refuse("a name is too long")
            attributes = self._attributes(node, bound)
            inputs = [values.get(name, _ANYTHING) for name in node["input"]]
            domain = node["domain"] or ""
            if domain == FUNCTIONS and not node["overload"] and node["op_type"] in self.functions:
                inner, results = self._call(node, attributes, inputs, calls)
            else:
                operator = OPERATORS.get(domain, {}).get(node["op_type"] or "")
                if operator is None or node["overload"]:
                    _refuse(f"unsupported operator {_shown(node['op_type'])} of domain {_shown(domain)}")
                inner, results = self._operator(operator, node, attributes, values, bound, calls, branches)
            count += inner
            if count > NODES:
                _refuse(f"it has more than {NODES} nodes when its functions are opened")
            values.update(zip(node["output"], results, strict=False))
        return count

    def _attributes(self, node: Message, bound: dict[str, Message]) -> dict[str, Message]:
        """The attributes of a node by name, with references resolved to the attributes of its function."""
        attributes: dict[str, Message] = {}
        for attribute in node["attribute"]:
            name, kind = attribute["name"], _ATTRIBUTES.get(attribute["type"])
            if not name or kind is None or name in attributes:
                _refuse(f"the attribute {_shown(name)} of {_shown(node['op_type'])} is malformed")
            reference = attribute["ref_attr_name"]
            if any(attribute[key] not in (None, []) for key in _FIELDS.values() if reference or key != _FIELDS[kind]):
                _refuse(f"the attribute {_shown(name)} of {_shown(node['op_type'])} is of two types")
            if not reference:
                attributes[name] = attribute
            elif reference in bound:
                if bound[reference]["type"] != attribute["type"]:
                    _refuse(f"the attribute {_shown(name)} of {_shown(node['op_type'])} is of another type")
                attributes[name] = bound[reference]
            # A reference to an attribute that the call omits counts as absent.
        return attributes

    def _operator(
        self,
        operator: Operator,
        node: Message,
        attributes: dict[str, Message],
        values: Values,
        bound: dict[str, Message],
        calls: int,
        branches: int,
    ) -> tuple[int, list[Known]]:
        """Checks one node against the table; returns its number of nodes and what is known of its outputs."""
        kind = node["op_type"]
        for names, text in ((node["input"], operator.inputs), (node["output"], operator.outputs)):
            parts, needed, repeated = _parameters(text)
            if len(names) < needed or (len(names) > len(parts) and not repeated):
                _refuse(f"{kind} has {len(names)} of {_shown(text)}")
            if any(not name and "?" not in part for name, part in zip(names, parts, strict=False)) or (
                repeated and not all(names[len(parts) - 1 :])
            ):
                _refuse(f"{kind} leaves out one of {_shown(text)}")
            if any(name and part == "-?" for name, part in zip(names, parts, strict=False)):
                _refuse(f"{kind} has an input that is not supported")
            if names and not names[-1]:
                _refuse(f"{kind} names one of {_shown(text)} that it leaves out")
        inner, results = 0, None
        for name, attribute in attributes.items():
            rule = operator.attributes.get(name)
            found = _ATTRIBUTES[attribute["type"]]
            value = attribute[_FIELDS[found]]
            if rule is None or rule.kind != found or value is None or not rule.allows(value):
                _refuse(f"{kind} has an attribute {_shown(name)} that is not allowed")
            if found == "GRAPH":
                if value["input"]:
                    _refuse(f"a branch of {kind} has inputs")
                nodes, results = self._graph(value, values, bound, calls, branches + 1)
                inner += nodes
                if len(results) != len(node["output"]):
                    _refuse(f"a branch of {kind} has another number of outputs")
        if missing := [name for name in operator.required if name not in attributes]:
            _refuse(f"{kind} lacks the attribute {missing[0]}")
        if problem := _PROBLEMS.get(kind, _no_problem)(node, attributes, values):
            _refuse(f"{kind} {problem}")
        return inner, results or self._results(operator, node, attributes, values)

    def _results(
        self, operator: Operator, node: Message, attributes: dict[str, Message], values: Values
    ) -> list[Known]:
        """The static information about the outputs of a node."""
        if node["op_type"] == "Constant":
            return [self._constant(attributes)]
        constant = all(values.get(name, _ANYTHING).constant for name in node["input"] if name)
        if node["op_type"] == "ConstantOfShape":
            return [Known(self._constant(attributes).dtype if attributes else _FLOAT, None, constant)]
        if node["op_type"] == "Cast":
            return [Known(attributes["to"]["i"], None, constant)]
        if node["op_type"] == "DequantizeLinear" and "output_dtype" not in attributes:
            return [Known(values.get(node["input"][1], _ANYTHING).dtype, None, constant)]
        if node["op_type"] == "Max":
            inputs = [values.get(name, _ANYTHING) for name in node["input"]]
            dtype = next((known.dtype for known in inputs if known.dtype), None)
            return [Known(dtype, None, constant, any(known.numbers and min(known.numbers) > 0 for known in inputs))]
        by_name = dict(zip((part.rstrip("?*") for part in operator.inputs.split()), node["input"], strict=False))
        results = []
        for part in operator.outputs.split():
            source = part.partition("=")[2]
            dtype = _NUMBERS.get(source) or values.get(by_name.get(source, ""), _ANYTHING).dtype
            results.append(Known(dtype, None, constant))
        if "*" in operator.outputs:
            results *= len(node["output"])
        return results

    def _constant(self, attributes: dict[str, Message]) -> Known:
        if len(attributes) != 1:
            _refuse("Constant has no value, or several")
        (attribute,) = attributes.values()
        if attribute["t"] is not None:
            return self._tensor(attribute["t"], "a constant")
        if _ATTRIBUTES[attribute["type"]] in ("INT", "INTS"):
            numbers = attribute["ints"] if attribute["i"] is None else [attribute["i"]]
            return Known(_NUMBERS["INT64"], tuple(numbers) if len(numbers) <= _FEW else None, constant=True)
        return Known(_FLOAT, constant=True)

    # Functions

    def _call(
        self, node: Message, attributes: dict[str, Message], inputs: list[Known], calls: int
    ) -> tuple[int, list[Known]]:
        function = self.functions[node["op_type"]]
        if len(inputs) != len(function["input"]) or len(node["output"]) > len(function["output"]):
            _refuse(f"{_shown(node['op_type'])} is called with another number of inputs or outputs")
        if not all(node["input"]):
            _refuse(f"{_shown(node['op_type'])} is called without one of its inputs")
        if any(attribute["g"] is not None for attribute in attributes.values()):
            _refuse(f"{_shown(node['op_type'])} is given a graph")
        return self._open(function, attributes, inputs, calls)

    def _open(
        self, function: Message, attributes: dict[str, Message], inputs: Sequence[Known], calls: int
    ) -> tuple[int, list[Known]]:
        """The number of nodes of a function, and the static information about its outputs, for one call."""
        if calls >= _CALLS:
            _refuse("its functions call one another too deeply")
        bound = {entry["name"]: entry for entry in function["attribute_proto"]} | attributes
        key = (function["name"], *((name, id(bound[name])) for name in sorted(bound)), *inputs)
        loops = any(node["op_type"] == "Loop" for node in function["node"])
        if key not in self.memo and loops and digest(function) == LOOP:
            self.memo[key] = len(function["node"]), [Known(_NUMBERS["INT64"])]
        if key not in self.memo:
            values = dict(zip(function["input"], inputs, strict=False))
            for info in function["value_info"]:
                self._value_info(info)
            count = self._nodes(function["node"], values, bound, calls + 1, 0)
            self.memo[key] = count, [values.get(name, _ANYTHING) for name in function["output"]]
        return self.memo[key]


def digest(function: Message) -> str:
    """Sha256 of the content of a function, independent of its serialization."""
    content = json.dumps(function, default=lambda raw: bytes(raw).hex(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _no_problem(node: Message, attributes: dict[str, Message], values: Values) -> str:
    return ""


def _split(node: Message, attributes: dict[str, Message], values: Values) -> str:
    sizes = len(node["input"]) > 1 and bool(node["input"][1])
    if sizes == ("num_outputs" in attributes):
        return "needs either sizes or a number of outputs"
    if not sizes and attributes["num_outputs"]["i"] != len(node["output"]):
        return "has another number of outputs than it says"
    return ""


def _division(node: Message, attributes: dict[str, Message], values: Values) -> str:
    """Dividing the smallest integer by -1 raises SIGFPE."""
    dividend, divisor = (values.get(name, _ANYTHING) for name in node["input"])
    if _FLOATS & {dividend.dtype, divisor.dtype}:
        return ""  # both are: engines require equal types
    if not divisor.positive and (divisor.numbers is None or not all(number > 0 for number in divisor.numbers)):
        return "of integers needs divisors that are known to be positive"
    return ""


def _layer(node: Message, attributes: dict[str, Message], values: Values) -> str:
    """These operators crash some engines when their input is constant and folded at load time."""
    first = next((name for name in node["input"] if name), "")
    return "works on a constant" if values.get(first, _ANYTHING).constant else ""


def _instance_norm(node: Message, attributes: dict[str, Message], values: Values) -> str:
    if values.get(node["input"][0], _ANYTHING).dtype != _FLOAT:
        return "of what is not known to be float32"  # it crashes on an empty float16 map
    return _layer(node, attributes, values)


_LAYERS = """Attention AveragePool BatchNormalization Conv ConvInteger ConvTranspose GlobalAveragePool GlobalMaxPool
GridSample GroupNormalization GroupQueryAttention InstanceNormalization LayerNormalization LpNormalization LRN
MatMulInteger MatMulNBits MaxPool MultiHeadAttention RMSNormalization RotaryEmbedding"""
_PROBLEMS = dict.fromkeys(_LAYERS.split(), _layer) | {
    "Split": _split,
    "Div": _division,
    "Mod": _division,
    "InstanceNormalization": _instance_norm,
}
"""Conditions on an operator beyond its number of inputs and the ranges of its attributes."""
