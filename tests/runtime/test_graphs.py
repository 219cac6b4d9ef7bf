"""Which graphs may be opened."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper, parser
from torch import nn

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime import graphs, load
from vqdeploy.runtime.bundle import Bundle, read_weights, sha256, tensors
from vqdeploy.runtime.manifest import FILE, WEIGHTS
from vqdeploy.runtime.operators import OPERATORS

ROOT = Path(__file__).parents[2]
HEAD = '<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1, "vqdeploy" : 1]>'


def model(body, signature="(float[N] x, int64[N] n) => (float[M] y)", functions=""):
    """A graph in ONNX's text syntax."""
    return parser.parse_model(f"{HEAD} g {signature} {{ {body} }} {functions}")


def check(proto, weights=None):
    graphs.check(proto.SerializeToString(), weights or {})


def refused(proto, reason, weights=None):
    with pytest.raises(ArtifactError, match=reason) as caught:
        check(proto, weights)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


# What is allowed


SYSTEMS = ("rqvae", "movq", "adaptive", "vit", "vqgan", "llamagen", "features", "vqvae2", "three", "var", "shared")


@pytest.mark.parametrize("system", SYSTEMS)
def test_packages_and_plans_of_every_system(artifacts, system):
    package = artifacts.package(system)
    weights = read_weights(package / WEIGHTS)
    for file in package.glob("*.onnx"):
        graphs.check(file.read_bytes(), weights)
    for portable in (False, True):
        plan = Bundle(artifacts.plan(system, portable=portable))
        weights = tensors(plan.member(WEIGHTS))
        for stage in plan.manifest.stages:
            graphs.check(plan.read(stage.file), {name: weights[name] for name in stage.weights})


class Block(nn.Module):
    """Layers that people use, in an order that makes no sense."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = nn.functional.pad(self.first(x), (1, 1, 1, 1), mode="reflect")
        for norm in self.norms:
            x = nn.functional.silu(norm(x))
        x = nn.functional.interpolate(self.up(x), scale_factor=0.5, mode="bilinear")
        x = nn.functional.max_pool2d(nn.functional.leaky_relu(x), 2) + nn.functional.adaptive_avg_pool2d(x, 1)
        x = self.attention(x.flatten(2).transpose(1, 2))
        left, right = self.last(x).chunk(2, -1)
        x = torch.where(left > 0, left.clamp(0, 1), right.tanh()).cumsum(1)
        values, places = x.topk(1, dim=-1)
        return values.logsumexp(1), places.argmax(1), torch.einsum("bij,bij->b", x, x)


def test_an_ordinary_module_of_somebody_else(tmp_path):
    program = torch.onnx.export(
        Block().eval(), (torch.zeros(2, 3, 8, 8),), dynamo=True, opset_version=24, verbose=False
    )
    program.save(tmp_path / "a.onnx")
    check(onnx.load(tmp_path / "a.onnx"))


def test_the_table_is_what_its_tool_writes():
    command = [sys.executable, ROOT / "tools" / "operators.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0  # noqa: S603


def test_no_operator_need_not_end_or_draws():
    names = {name for table in OPERATORS.values() for name in table}
    assert not names & {"Loop", "Scan", "RandomUniformLike", "RandomNormal", "Multinomial", "Bernoulli", "Dropout"}


# What ends a process in ONNX Runtime


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a, y = Split <num_outputs = 1> (x)", "Split has another number of outputs"),
        ("y = Split (x)", "Split needs either sizes"),
        ("y = Split <num_outputs = 1> (x, n)", "Split needs either sizes"),
        ("y = GatherND <batch_dims = -7> (x, n)", "attribute 'batch_dims' that is not allowed"),
        ("y = Max (x, , x)", "Max leaves out"),
        ("y = RandomUniformLike <high = -1.0> (x)", "unsupported operator 'RandomUniformLike'"),
        ("k = Div (n, n) y = Cast <to = 1> (k)", "Div of integers needs divisors that are known"),
        (
            "m = Constant <value_ints = [-1]> () k = Div (n, m) y = Cast <to = 1> (k)",
            "divisors that are known to be pos",
        ),
        (
            "m = Constant <value_ints = [0]> () k = Mod (n, m) y = Cast <to = 1> (k)",
            "divisors that are known to be pos",
        ),
        ("m = Shape (x) k = Div (n, m) y = Cast <to = 1> (k)", "divisors that are known"),
        (
            "s = Constant <value_ints = [1, 4, 8, 0]> () c = ConstantOfShape (s) y = InstanceNormalization (c, x, x)",
            "const",
        ),
        ("h = Cast <to = 10> (x) y = InstanceNormalization (h, h, h)", "not known to be float32"),
        ("y = Sum ()", "Sum has 0 of"),
        ("y = Add (x)", "Add has 1 of"),
        ("y = Add (x, x, x)", "Add has 3 of"),
        ("y, z = Add (x, x)", "Add has 2 of"),
        ("y = Concat (x, x)", "Concat lacks the attribute axis"),
        ("y = Concat <axis = 9> (x, x)", "'axis' that is not allowed"),
        ('y = Concat <axis = "0"> (x, x)', "'axis' that is not allowed"),
        ("y = Cast <to = 8> (x)", "'to' that is not allowed"),
        ('y = Pad <mode = "chaos"> (x, n)', "'mode' that is not allowed"),
        ("y = Relu <speed = 1> (x)", "'speed' that is not allowed"),
        ('y = Einsum <equation = "i,i->i\x1b"> (x, x)', "'equation' that is not allowed"),
        ("y = Constant <value_int = 1, value_float = 1.0> ()", "no value, or several"),
        ("y = com.microsoft.Gelu (x)", "unsupported operator 'Gelu'"),
        ("y = vqdeploy.Nothing (x)", "unsupported operator 'Nothing'"),
        ("y = Loop (n, , x)", "unsupported operator 'Loop'"),
    ],
)
def test_a_node_that_no_exporter_writes(body, reason):
    refused(model(body), reason)


@pytest.mark.parametrize(
    "body",
    [
        "a, y = Split <num_outputs = 2> (x)",
        "y = GatherND <batch_dims = 0> (x, n)",
        "y = Max (x, x)",
        "y = Div (x, x)",
        "m = Constant <value_ints = [2]> () k = Div (n, m) y = Cast <to = 1> (k)",
        "h = Cast <to = 1> (n) y = Div (h, x)",
        "y = Clip (x, , x)",
        "y = Sum (x)",
        "y = Identity (x)",
    ],
)
def test_a_node_that_is_fine(body):
    check(model(body))


def function(name, body, head="(x) => (y)", attributes=""):
    return f'<opset_import: ["" : 24, "vqdeploy" : 1], domain: "vqdeploy"> {name} {attributes} {head} {{ {body} }}'


def test_functions_are_looked_into():
    bad = function("F", "y = Max (x, , x)")
    refused(model("y = vqdeploy.F (x)", functions=bad), "Max leaves out")
    check(model("y = vqdeploy.F (x)", functions=function("F", "y = Relu (x)")))


def test_attributes_that_a_call_gives_are_checked_where_they_are_used():
    body = function("F", "y = GatherND <batch_dims: int = @b> (x, n)", "(x, n) => (y)", "<b>")
    check(model("y = vqdeploy.F <b = 0> (x, n)", functions=body))
    refused(model("y = vqdeploy.F <b = -7> (x, n)", functions=body), "'batch_dims' that is not allowed")
    refused(model('y = vqdeploy.F <b = "0"> (x, n)', functions=body), "is of another type")


def test_types_and_constants_are_followed_into_functions():
    body = function("F", "k = Div (n, d) y = Cast <to = 1> (k)", "(n, d) => (y)")
    check(model("d = Constant <value_ints = [2]> () y = vqdeploy.F (n, d)", functions=body))
    refused(model("y = vqdeploy.F (n, n)", functions=body), "divisors that are known")


def test_functions_that_call_themselves_or_double():
    refused(model("y = vqdeploy.F (x)", functions=function("F", "y = vqdeploy.F (x)")), "call one another too deeply")
    doubling = [function("F0", "y = Relu (x)")]
    calls = " ".join(f"y{i} = vqdeploy.F{{0}} (x)" for i in range(19)) + " y = vqdeploy.F{0} (x)"
    doubling += [function(f"F{n + 1}", calls.format(n)) for n in range(5)]
    refused(model("y = vqdeploy.F5 (x)", functions=" ".join(doubling)), "more than 20000 nodes when")


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (function("F", "y = Relu (x)") + function("G", "y = Relu (x)"), "never calls its function 'G'"),
        (function("F", "y = Relu (x)") * 2, "forbidden name"),
        (function("F", "y = Relu (x)").replace('"" : 24', '"" : 7'), "unsupported opset 7"),
        (function("F", "y = Relu (x)").replace('domain: "vqdeploy"', 'domain: "com.microsoft"'), "forbidden name"),
        (function("F", "y = Relu (x)", "(x, z) => (y)"), "another number of inputs"),
    ],
)
def test_functions_of_the_wrong_form(functions, reason):
    refused(model("y = vqdeploy.F (x)", functions=functions), reason)


def test_a_long_chain():
    nodes = "".join(f"v{i + 1} = Relu (v{i}) " for i in range(graphs.NODES))
    refused(model(f"v0 = Relu (x) {nodes} y = Relu (v0)"), "more than 20000 nodes")


def test_conditions():
    nested = "t = Identity (x)"
    for level in range(6):
        branch = f"b{level} () => (t) {{ {nested} }}"
        nested = f"t = If (c) <then_branch = {branch}, else_branch = {branch}>"
        proto = model(f"c = IsNaN (x) {nested} y = Identity (t)")
        if level < 4:
            check(proto)
    refused(proto, "too deep")
    branch = "b () => (t) { t = Max (x, , x) }"
    refused(model(f"c = IsNaN (x) y = If (c) <then_branch = {branch}, else_branch = {branch}>"), "Max leaves out")


def with_tensor(tensor):
    proto = model("y = Add (x, w)")
    proto.graph.initializer.append(tensor)
    return proto


def external(location, name="w"):
    tensor = onnx.TensorProto(name=name, dims=[4], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value=location)
    return with_tensor(tensor)


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.safetensors", "*/_ORT_MEM_ADDR_/*", "", WEIGHTS])
def test_tensors_of_other_files(location):
    refused(external(location), "is stored in another file than the weights")
    weights = {"w": np.zeros(4, np.float32)}
    if location == WEIGHTS:
        check(external(location), weights)
    else:
        refused(external(location), "is stored in another file than the weights", weights)


@pytest.mark.parametrize("weight", [np.zeros(3, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32)])
def test_tensors_that_are_not_those_of_the_file(weight):
    refused(external(WEIGHTS), "is not the tensor in the file", {"w": weight})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dims": [5]}, "as many numbers as its shape"),
        ({"dims": [-4]}, "shape of 'w' is malformed"),
        ({"dims": [2**62, 2**62]}, "as many numbers as its shape"),
        ({"dims": [1] * 40}, "shape of 'w' is malformed"),
        ({"data_type": 8}, "type that is not supported"),
        ({"data_type": 99}, "type that is not supported"),
        ({"raw_data": b"\0" * 15}, "as many numbers"),
        ({"int32_data": [1]}, "type that is not supported"),
        ({"name": ""}, "a tensor has no name"),
    ],
)
def test_tensors_that_lie(change, reason):
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    for key, value in change.items():
        if isinstance(value, list):
            del getattr(tensor, key)[:]
            getattr(tensor, key).extend(value)
        else:
            setattr(tensor, key, value)
    refused(with_tensor(tensor), reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "ir_version", 3), "its version is 3"),
        (lambda m: setattr(m.opset_import[0], "version", 7), "unsupported opset 7"),
        (lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1)), "unsupported opset 1 of domain"),
        (lambda m: m.opset_import.append(helper.make_opsetid("", 24)), "imported twice"),
        (lambda m: m.training_info.add(), "unexpected field 20"),
        (lambda m: m.graph.sparse_initializer.add(), "unexpected field 15"),
        (lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent(), "unexpected field 4"),
        (
            lambda m: m.graph.input[0].type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 99),
            "shape",
        ),
        (lambda m: setattr(m.graph.node[0], "overload", "x"), "unsupported operator"),
        (lambda m: m.graph.node[0].CopyFrom(helper.make_node("Clip", ["x", "x", ""], ["y"])), "that it leaves out"),
        (lambda m: m.graph.node[0].output.__setitem__(0, "x" * 5000), "a name is too long"),
        (lambda m: m.graph.node[0].attribute.add(name="axis", type=2, i=0, f=1.0), "is of two types"),
        (lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("axis", 0)] * 2), "is malformed"),
        (lambda m: m.graph.node[0].attribute.add(name="axis", type=11), "is malformed"),
    ],
)
def test_models_of_the_wrong_form(change, reason):
    proto = model("y = Flatten (x)")
    change(proto)
    refused(proto, reason)


# Where it is asked


def edited(plan, target, stage, proto, weights=()):
    """A copy of a plan with right digests and another graph."""
    with zipfile.ZipFile(plan) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"{stage}.onnx"] = proto.SerializeToString()
    (target.parent / "graph").write_bytes(members[f"{stage}.onnx"])
    manifest = json.loads(members[FILE])
    manifest["members"][f"{stage}.onnx"] = sha256(target.parent / "graph")
    for info in manifest["stages"]:
        if info["name"] == stage:
            info["weights"] = list(weights)
    members[FILE] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def test_a_plan_with_a_hostile_graph(plan, tmp_path):
    signature = "(int64[batch, 4, 4, 4] codes) => (uint8[batch, 16, 16, 3] image)"
    path = edited(plan, tmp_path / "a.plan", "decode", model("image = Max (codes, , codes)", signature))
    with (
        load(path) as pipeline,
        pytest.raises(ArtifactError, match=r"stage decode of .*a\.plan cannot be opened \(.*Max"),
    ):
        pipeline.decode(np.zeros((1, 4, 4, 4), np.int64))


def test_constants_that_double_are_not_worked_out_while_a_graph_opens(plan, tmp_path):
    """They would take 128 GB. ONNX Runtime knows their size before it works them out."""
    signature = "(int64[batch, 4, 4, 4] codes) => (uint8[batch, 16, 16, 3] image)"
    double = "".join(f"v{i + 1} = Concat <axis = 0> (v{i}, v{i}) " for i in range(34))
    body = f"v0 = Constant <value_floats = [1.0]> () {double} s = ReduceSum <keepdims = 0> (v34) "
    body += "k = Cast <to = 2> (s) n = Constant <value_ints = [-1, 16, 16, 3]> () image = Expand (k, n)"
    path = edited(plan, tmp_path / "a.plan", "decode", model(body, signature))
    script = (
        "import contextlib, resource, sys\n"
        "from vqdeploy.errors import VqdeployError\n"
        "from vqdeploy.runtime import load\n"
        "with contextlib.suppress(VqdeployError): load(sys.argv[1], threads=1).session('decode')\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**21"  # 2 GiB
    )
    subprocess.run([sys.executable, "-c", script, path], check=True)  # noqa: S603
