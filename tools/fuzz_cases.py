"""Damaged and hostile files and arguments, of every kind that vqdeploy reads; `tools/fuzz.py` runs them.

A case is a kind and a number: the same pair makes the same files. Digests are computed anew after a change, so that
the code behind the check is reached.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from vqdeploy.errors import VqdeployError
from vqdeploy.options import OPTIONS
from vqdeploy.runtime import load, rules
from vqdeploy.runtime.operators import OPERATORS
from vqdeploy.systems import SYSTEMS

LONGEST = 500  # most characters of a message
_MANIFEST, _WEIGHTS = "manifest.json", "weights.safetensors"
_LARGEST = 1 << 24  # most pixels and codes that the harness passes

Members = dict[str, bytes]


class Fault(Exception):
    """A fault, which no input may cause; the text names its kind."""


@dataclass
class Material:
    """Valid artifacts to start from: `NAME-onnx`, `NAME.plan`, `NAME-portable.plan` in a folder."""

    folder: Path
    systems: tuple[str, ...] = tuple(SYSTEMS)

    def package(self, rnd: random.Random) -> Path:
        """A package of some system."""
        return self.folder / f"{rnd.choice(self.systems)}-onnx"

    def plan(self, rnd: random.Random) -> Path:
        """A plan of some system."""
        return self.folder / f"{rnd.choice(self.systems)}{rnd.choice(('', '', '-portable'))}.plan"


# Uses of a file, which must succeed or raise a one-sentence error


def use_plan(path: Path, rnd: random.Random) -> None:
    """Loads a plan and runs all tasks."""
    with load(path, device="cpu", threads=1) as pipeline:
        for info in pipeline.manifest.stages:
            shapes = {i.name: [s if isinstance(s, int) else 1 for s in i.shape] for i in info.inputs}
            if sum(map(math.prod, shapes.values())) < _LARGEST:
                with contextlib.suppress(VqdeployError):
                    pipeline.run(info.name, **{i.name: np.zeros(shapes[i.name], i.dtype) for i in info.inputs})
        if pipeline.manifest.tokenizer and math.prod(pipeline.image_shape) < _LARGEST:
            images = np.full((1, *pipeline.image_shape), rnd.randrange(256), np.uint8)
            with contextlib.suppress(VqdeployError):
                pipeline.decode(pipeline.encode(images))
            with contextlib.suppress(VqdeployError):
                pipeline.features(images)
        if pipeline.manifest.sampling:
            options: dict[str, Any] = {"seed": rnd.randrange(100)}
            if "steps" in pipeline.sampling.options:
                options["steps"] = 2
            if rnd.random() < 0.3:
                options["temperature"] = 0
            pipeline.generate([0], **options)


def use_command(*arguments: object) -> None:
    """Runs a command line in this process."""
    from vqdeploy.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    old, logger = sys.argv, logging.getLogger("vqdeploy")
    level, terminated = logger.level, signal.getsignal(signal.SIGTERM)
    sys.argv = ["vqdeploy", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, terminated)
        logger.setLevel(level)
        for handler in [h for h in logging.root.handlers if getattr(h, "stream", None) is err]:
            logging.root.removeHandler(handler)
    out.flush()
    err.flush()
    said = err.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    shown = out.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    if "Traceback" in said:
        raise Fault(f"traceback: {said.strip().splitlines()[-1][:300]}")
    if code not in (0, 1, 2):
        raise Fault(f"exit code {code}")
    for line in said.splitlines():
        check_message(line)
    if not all(character.isprintable() or character == "\n" for character in shown):
        raise Fault("message: control characters on stdout")
    if code:
        raise VqdeployError("refused")


def check_message(text: str) -> None:
    """Checks that a message is one printable line."""
    if len(text) > LONGEST:
        raise Fault(f"message: {len(text)} characters: {text[:100]!a}")
    if not text.isprintable():
        raise Fault(f"message: control characters: {text[:200]!a}")


# Values


TEXTS = (
    "",
    "x",
    "\x1b[31mred",
    "\ud800",
    "\x00",
    "..",
    "/etc/passwd",
    "a" * 300,
    "ä" * 40,
    "batch",
    "nan",
    "\u202e",
    "1e999",
)
NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    -(2**63),
    2**70,
    10**30,
    0.5,
    -0.5,
    1e300,
    1e-300,
)


LONG = "a long number"


def value(rnd: random.Random) -> Any:
    """Some JSON."""
    kind = rnd.randrange(12)
    if kind < 4:
        return rnd.choice(NUMBERS)
    if kind < 7:
        return rnd.choice(TEXTS)
    if kind < 9:
        return rnd.choice((None, True, False))
    if kind == 9:
        return rnd.choice((float("nan"), float("inf"), "x" * 1_000_000, LONG))
    if kind == 10:
        return [value(rnd) for _ in range(rnd.randrange(4))] * rnd.choice((1, 1, 1, 40))
    return {str(rnd.choice(TEXTS)): value(rnd) for _ in range(rnd.randrange(3))}


def to_text(data: Any) -> str:
    """JSON, with a number of more digits than Python writes."""
    return json.dumps(data).replace(json.dumps(LONG), "9" * 5000)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        data = data[key]
    return data


def mutate_json(data: Any, rnd: random.Random) -> None:
    """Changes one value of a document."""
    paths = list(places(data))
    # Lists of names are long: choose how deep first, so that rare values are reached.
    depth = rnd.choice(sorted({len(path) for path in paths}))
    *path, last = rnd.choice([path for path in paths if len(path) == depth])
    parent, kind = at(data, tuple(path)), rnd.randrange(10)
    if kind < 5:
        parent[last] = value(rnd)
    elif kind == 5:
        del parent[last]
    elif kind == 6:
        parent[last] = copy.deepcopy(at(data, rnd.choice(paths)))
    elif kind == 7 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[last]))
    elif kind == 8 and isinstance(parent, dict):
        parent[rnd.choice((*TEXTS, *map(str, parent)))] = parent.pop(last)
    elif isinstance(parent[last], int):
        parent[last] += rnd.choice((-1, 1, 10, -100))
    else:
        parent[last] = rnd.choice((0, 1, "", None, [], {}))


def mutate_bytes(content: bytes, rnd: random.Random) -> bytes:
    """Flips, cuts, repeats or inserts."""
    data = bytearray(content)
    for _ in range(rnd.choice((1, 1, 2, 5, 40))):
        at_ = rnd.randrange(len(data) + 1)
        kind = rnd.randrange(6)
        if kind < 3 and at_ < len(data):
            data[at_] = rnd.choice((0, 0xFF, data[at_] ^ (1 << rnd.randrange(8)), rnd.randrange(256)))
        elif kind == 3:
            del data[at_ : at_ + rnd.choice((1, 2, 4, 100, len(data)))]
        elif kind == 4:
            data[at_:at_] = rnd.randbytes(rnd.choice((1, 2, 4, 100)))
        else:
            data[at_ : at_ + 8] = struct.pack("<q", rnd.choice((0, -1, 2**31, 2**62, len(data))))
    return bytes(data)


# Plans and packages as members


def members(path: Path) -> tuple[Any, Members]:
    """The manifest and the other members of a plan or a package."""
    if path.is_dir():
        found = {file.name: file.read_bytes() for file in path.iterdir()}
    else:
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(found.pop(_MANIFEST)), found


def digests(manifest: Any, files: Members) -> None:
    """Updates the digests of the members in a manifest."""
    if isinstance(manifest, dict) and isinstance(manifest.get("members"), dict):
        for name in files:
            if name in manifest["members"]:
                manifest["members"][name] = hashlib.sha256(files[name]).hexdigest()


def write_plan(path: Path, manifest: Any, files: Members) -> Path:
    """Writes a plan with correct digests."""
    digests(manifest, files)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_MANIFEST, to_text(manifest))
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_package(folder: Path, manifest: Any, files: Members) -> Path:
    """Writes a package with correct digests."""
    digests(manifest, files)
    folder.mkdir()
    (folder / _MANIFEST).write_text(to_text(manifest))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def graph_of(files: Members, rnd: random.Random) -> str:
    """The name of some graph."""
    return rnd.choice(sorted(name for name in files if name.endswith(".onnx")))


# Graphs


def node_lists(model: onnx.ModelProto) -> list[Any]:
    """The lists of nodes of a model: of its graph, its functions and its branches."""
    lists = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in lists:
        for node in nodes:
            lists += [attribute.g.node for attribute in node.attribute if attribute.HasField("g")]
    return [nodes for nodes in lists if nodes]


def attribute_value(rule: Any, rnd: random.Random) -> Any:
    """A value that a rule allows, most often."""
    if isinstance(rule, rules.Ints):
        wild = (rule.low, rule.high, rnd.randint(rule.low, rule.high), rule.low - 1, rule.high + 1)
        tame = [number for number in range(-3, 9) if rule.low <= number <= rule.high]
        return max(-(2**63), min(2**63 - 1, rnd.choice(tame or wild if rnd.random() < 0.7 else wild)))
    if isinstance(rule, rules.List):
        return [attribute_value(rule.each, rnd) for _ in range(rnd.choice((0, 1, 2, 2, 3, 4, 4, 8)))]
    if isinstance(rule, rules.OneOf):
        return rnd.choice(rule.values)
    if isinstance(rule, rules.Floats):
        return rnd.choice((0.0, 1.0, -1.0, 1e-5, 1e30, float("inf"), float("nan")))
    if isinstance(rule, rules.Matching):
        return rnd.choice(("ij,jk->ik", "ii->i", "ij,kj", "...i,ij->...j", ",->", "i,j->ij", "ij->k", "->"))
    return numpy_helper.from_array(np.ones(rnd.choice(([], [1], [2, 2])), rnd.choice((np.float32, np.int64))))


def mutate_graph(model: onnx.ModelProto, rnd: random.Random) -> None:
    """Changes one part of a graph."""
    nodes = rnd.choice(node_lists(model))
    place = rnd.randrange(len(nodes))
    node, kind = nodes[place], rnd.randrange(14)
    names = [name for other in nodes for name in (*other.input, *other.output)] or [""]
    initializers = model.graph.initializer
    if kind == 0:
        domain = rnd.choice(("", "", "", "com.microsoft"))
        node.domain, node.op_type = (
            domain,
            rnd.choice([*OPERATORS[domain], "Loop", "Scan", "RandomUniformLike", "Dropout"]),
        )
    elif kind in (1, 2):
        table = OPERATORS.get(node.domain, {}).get(node.op_type)
        name = rnd.choice(list(table.attributes)) if table and table.attributes else "axis"
        rule = table.attributes[name] if table and table.attributes else rules.AXIS
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if (
            rnd.random() < 0.85
            and getattr(rule, "kind", "") != "GRAPH"
            and (new := attribute_value(rule, rnd)) not in ([], None)
        ):
            node.attribute.append(helper.make_attribute(name, new))
    elif kind == 3 and node.input:
        node.input[rnd.randrange(len(node.input))] = rnd.choice((*names, ""))
    elif kind == 4:
        node.input.append(rnd.choice((*names, "")))
    elif kind == 5 and node.input:
        del node.input[rnd.randrange(len(node.input))]
    elif kind == 6 and node.output:
        node.output[rnd.randrange(len(node.output))] = rnd.choice((*names, ""))
    elif kind == 7:
        node.output.append(rnd.choice((*names, "more")))
    elif kind == 8:
        del nodes[place]
    elif kind == 9:
        nodes.append(copy.deepcopy(node))
    elif kind == 10 and initializers:
        tensor = rnd.choice(initializers)
        if rnd.random() < 0.5 and tensor.dims:
            tensor.dims[rnd.randrange(len(tensor.dims))] = rnd.choice((0, 1, -1, 2, 2**31, 2**62))
        elif tensor.raw_data:
            tensor.raw_data = mutate_bytes(tensor.raw_data, rnd)
    elif kind == 11 and initializers:
        tensor = rnd.choice(initializers)
        small = np.array(
            [rnd.choice((0, 1, -1, 2, 3, 2**31, 2**63 - 1, -(2**63))) for _ in range(rnd.randrange(5))], np.int64
        )
        tensor.CopyFrom(numpy_helper.from_array(small, tensor.name))
    elif kind == 12:
        info = rnd.choice((*model.graph.input, *model.graph.output, *model.graph.value_info))
        shape = info.type.tensor_type.shape.dim
        if shape and rnd.random() < 0.7:
            shape[rnd.randrange(len(shape))].dim_value = rnd.choice((0, 1, 2, -1, 2**40, 2**63 - 1))
        else:
            info.type.tensor_type.elem_type = rnd.choice((1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 99))
    else:
        node.name = rnd.choice((*TEXTS[:3], "x" * 100_000))


def random_node(rnd: random.Random) -> tuple[onnx.ModelProto, list[tuple[str, np.ndarray]]]:
    """A graph of one node of the table, with inputs of any type and shape, some of them constants."""
    domain = rnd.choice(("", "", "", "", "com.microsoft"))
    name = rnd.choice([name for name in OPERATORS[domain] if name != "If"])
    operator, draws = OPERATORS[domain][name], np.random.default_rng(rnd.randrange(2**32))
    shape = [rnd.choice((0, 1, 2, 2, 3, 4, 8)) for _ in range(rnd.choice((0, 1, 2, 3, 4, 4)))]
    inputs, fed, constants = [], [], []
    parts = operator.inputs.split()
    if parts and parts[-1].endswith("*"):
        parts = parts[:-1] + [parts[-1]] * rnd.choice((1, 2, 3))
    for place, part in enumerate(parts):
        if part.endswith("?") and rnd.random() < 0.5:
            inputs.append("")
            continue
        array = _random_array(part.rstrip("?*"), shape, rnd, draws)
        inputs.append(f"i{place}")
        if rnd.random() < 0.4:
            constants.append(numpy_helper.from_array(array, inputs[-1]))
        else:
            fed.append((inputs[-1], array))
    attributes = {k: attribute_value(r, rnd) for k, r in operator.attributes.items() if rnd.random() < 0.6}
    attributes = {k: v for k, v in attributes.items() if v not in (None, [])}
    count = rnd.choice((1, 1, 2, 3)) if "*" in operator.outputs or " " in operator.outputs else 1
    outputs = [f"o{place}" for place in range(count)]
    node = helper.make_node(name, inputs, outputs, domain=domain, **attributes)
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape)) for n, a in fed]
    size = helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [])
    nodes = [node, helper.make_node("Size", ["o0"], ["size"])]
    graph = helper.make_graph(nodes, "g", infos, [size], constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), fed


def _random_array(name: str, shape: list[int], rnd: random.Random, draws: np.random.Generator) -> np.ndarray:
    like_indices = (
        "axes",
        "shape",
        "pads",
        "start",
        "end",
        "step",
        "repeat",
        "split",
        "indic",
        "size",
        "depth",
        "limit",
    )
    if any(word in name.lower() for word in (*like_indices, "delta", "seqlen", "sequence", "position")) or name == "K":
        dtype: Any = rnd.choice((np.int64, np.int64, np.int64, np.int32))
        shape = rnd.choice(([], [1], [2], [len(shape)], [2 * len(shape)], shape))
    else:
        dtype = rnd.choice(
            (np.float32,) * 6 + (np.int64, np.int32, np.uint8, np.int8, np.bool_, np.float16, np.float64)
        )
        if rnd.random() < 0.5:
            shape = rnd.choice((shape[1:], [*shape, 2], [rnd.randrange(5) for _ in shape], shape[1:2]))
    array = np.asarray(draws.integers(-3, 9, shape) if np.dtype(dtype).kind in "iu" else draws.standard_normal(shape))
    array = np.array(array.astype(dtype))
    if array.size and rnd.random() < 0.25 and array.dtype.kind in "if":
        wild = (2**31 - 1, -(2**31), -1, 0, 2**62, -(2**63)) if array.dtype.kind == "i" else (np.nan, np.inf, 1e30, 0)
        with np.errstate(over="ignore"):
            array.reshape(-1)[rnd.randrange(array.size)] = np.array(rnd.choice(wild)).astype(array.dtype)
    return array


# The kinds of cases: each makes files in an empty folder and uses them


def plan_bytes(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan with damaged bytes."""
    content = material.plan(rnd).read_bytes()
    (folder / "a.plan").write_bytes(
        mutate_bytes(content, rnd) if rnd.random() < 0.8 else rnd.randbytes(rnd.randrange(2000))
    )
    use_plan(folder / "a.plan", rnd)


def plan_directory(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan with a damaged ZIP directory, and archives with odd members."""
    manifest, files = members(material.plan(rnd))
    path = write_plan(folder / "a.plan", manifest, files)
    kind = rnd.randrange(5)
    if kind < 3:
        content = path.read_bytes()
        tail = rnd.choice((22, 100, 1000))
        path.write_bytes(content[:-tail] + mutate_bytes(content[-tail:], rnd))
    else:
        method = rnd.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(path, "a", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two members of one name
            for _ in range(rnd.choice((1, 3, 1000))):
                name = rnd.choice((_MANIFEST, "../evil", "x" * 60_000, "a\x1b[31m", *files, rnd.choice(TEXTS[1:])))
                with contextlib.suppress(UnicodeEncodeError, IndexError):
                    archive.writestr(name.replace("\ud800", "?"), b"")
            archive.comment = rnd.randbytes(rnd.choice((0, 10, 60_000)))
    use_plan(path, rnd)


def plan_manifest(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan whose manifest says something else."""
    manifest, files = members(material.plan(rnd))
    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
        mutate_json(manifest, rnd)
    path = write_plan(folder / "a.plan", manifest, files)
    if rnd.random() < 0.2:
        use_command("inspect", path, *(["--json"] if rnd.random() < 0.5 else []))
    else:
        use_plan(path, rnd)


def plan_graph(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan with a graph that was edited."""
    manifest, files = members(material.plan(rnd))
    name = graph_of(files, rnd)
    model = onnx.load_from_string(files[name])
    for _ in range(rnd.choice((1, 1, 2, 3))):
        mutate_graph(model, rnd)
    files[name] = model.SerializeToString()
    use_plan(write_plan(folder / "a.plan", manifest, files), rnd)


def plan_interface(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan of which a graph and the manifest agree, on other inputs and outputs than its sampler knows."""
    manifest, files = members(material.plan(rnd))
    stage = rnd.choice(manifest["stages"])
    model = onnx.load_from_string(files[stage["file"]])
    for _ in range(rnd.choice((1, 1, 2))):
        mutate_interface(stage, model.graph, rnd)
    files[stage["file"]] = model.SerializeToString()
    use_plan(write_plan(folder / "a.plan", manifest, files), rnd)


def mutate_interface(stage: Any, graph: onnx.GraphProto, rnd: random.Random) -> None:
    """Changes an input or an output of a stage and of its graph in the same way."""
    side = rnd.choice(("inputs", "outputs", "outputs"))
    infos, values = stage[side], graph.input if side == "inputs" else graph.output
    place = rnd.randrange(len(infos)) if infos else 0
    kind = rnd.randrange(7) if infos else 5
    if kind == 0:  # another name
        _rename(stage, graph, infos[place]["name"], rnd.choice(("x", "codes", "label", "present_x", "past_x", "noise")))
    elif kind == 1 and side == "outputs":
        stage["aliases"].pop(infos[place]["name"], None)
        del infos[place], values[place]
    elif kind == 2:  # another order
        infos.append(infos.pop(place))
        moved = copy.deepcopy(values[place])
        del values[place]
        values.append(moved)
    elif kind == 3:  # an open dimension of another name
        other = rnd.choice(("batch", "n", "length", "conditions"))
        for name in list(stage["dims"]):
            stage["dims"].setdefault(other, stage["dims"][name])
        for info, tensor in zip(infos, values, strict=True):
            dims = tensor.type.tensor_type.shape.dim
            for axis, size in enumerate(info["shape"]):
                if isinstance(size, str) and rnd.random() < 0.5:
                    info["shape"][axis] = dims[axis].dim_param = other
    elif kind == 4:  # a size for an open dimension, or the other way round
        dims = values[place].type.tensor_type.shape.dim
        if dims:
            axis, size = rnd.randrange(len(dims)), rnd.choice((0, 1, 2, 5, 2**20, "batch"))
            infos[place]["shape"][axis] = size
            if isinstance(size, str):
                dims[axis].dim_param = size
            else:
                dims[axis].dim_value = size
    elif kind == 5:  # one more
        new = copy.deepcopy(graph.input[0])
        new.name = "more"
        infos.append(stage["inputs"][0] | {"name": "more"})
        values.append(new)
        if side == "outputs":
            graph.node.append(helper.make_node("Identity", [graph.input[0].name], ["more"]))
    elif stage["inputs"] and stage["outputs"]:
        stage["aliases"] = {
            rnd.choice(stage["outputs"])["name"]: rnd.choice(stage["inputs"])["name"] for _ in range(rnd.randrange(3))
        }


def _rename(stage: Any, graph: onnx.GraphProto, old: str, new: str) -> None:
    for value_ in (*graph.input, *graph.output, *graph.value_info):
        value_.name = new if value_.name == old else value_.name
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = new if name == old else name
    for info in (*stage["inputs"], *stage["outputs"]):
        info["name"] = new if info["name"] == old else info["name"]
    stage["aliases"] = {new if o == old else o: new if i == old else i for o, i in stage["aliases"].items()}


def plan_graph_bytes(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan with a graph whose bytes are damaged and whose digest is right."""
    manifest, files = members(material.plan(rnd))
    name = graph_of(files, rnd)
    files[name] = mutate_bytes(files[name], rnd)
    use_plan(write_plan(folder / "a.plan", manifest, files), rnd)


def plan_node(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan about arrays, whose one stage has one node of any kind."""
    manifest, _ = members(material.plan(rnd))
    model, fed = random_node(rnd)
    files = {"node.onnx": model.SerializeToString()}
    infos = [{"name": name, "dtype": str(array.dtype), "shape": list(array.shape)} for name, array in fed]
    outputs = [{"name": "size", "dtype": "int64", "shape": []}]
    stage = {"name": "node", "file": "node.onnx", "inputs": infos, "outputs": outputs}
    manifest |= {"stages": [stage], "members": {"node.onnx": ""}, "tokenizer": None, "sampling": None, "labels": []}
    with load(write_plan(folder / "a.plan", manifest, files), device="cpu", threads=1) as pipeline:
        pipeline.run("node", **dict(fed))


def plan_weights(rnd: random.Random, material: Material, folder: Path) -> None:
    """A plan with other weights."""
    manifest, files = members(material.plan(rnd))
    files[_WEIGHTS] = mutate_weights(files[_WEIGHTS], rnd)
    use_plan(write_plan(folder / "a.plan", manifest, files), rnd)


def mutate_weights(content: bytes, rnd: random.Random) -> bytes:
    """Another safetensors file: another header, or other numbers."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rnd.randrange(4)
    if kind == 0:
        wild = struct.pack("<f", rnd.choice((float("nan"), float("inf"), 1e38)))
        place = rnd.randrange(len(data) // 4) * 4
        return content[: 8 + size] + data[:place] + wild * 16 + data[place + 64 :]
    if kind == 1:
        return mutate_bytes(content[: 8 + size], rnd) + data
    if kind == 2:
        return content[: rnd.randrange(len(content))]
    mutate_json(header, rnd)
    text = to_text(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def package(rnd: random.Random, material: Material, folder: Path) -> None:
    """A package in which something was changed, built and run."""
    manifest, files = members(material.package(rnd))
    kind = rnd.randrange(5)
    if kind == 0:
        mutate_json(manifest, rnd)
    elif kind == 1:
        files[_WEIGHTS] = mutate_weights(files[_WEIGHTS], rnd)
    elif kind == 2:
        name = graph_of(files, rnd)
        files[name] = mutate_bytes(files[name], rnd)
    elif kind == 3:
        del files[rnd.choice(sorted(files))]
    else:
        name = graph_of(files, rnd)
        model = onnx.load_from_string(files[name])
        mutate_graph(model, rnd)
        files[name] = model.SerializeToString()
    source = write_package(folder / "package", manifest, files)
    if rnd.random() < 0.1:
        odd_file(source / rnd.choice((*files, _MANIFEST)), rnd)
    use_command("build", source, "-o", folder / "a.plan", *(["--device", "cuda"] if rnd.random() < 0.3 else []))
    use_plan(folder / "a.plan", rnd)


def odd_file(path: Path, rnd: random.Random) -> None:
    """Replaces a path by another file or something that is not a file."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    kind = rnd.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    else:
        path.touch()


def odd_paths(rnd: random.Random, material: Material, folder: Path) -> None:
    """Pipes, devices, links and folders instead of files."""
    name = rnd.choice(("a.plan", "a.png", "a.npz", "\x1b[31m.plan", "a\nb.png", os.fsdecode(b"\xff.plan"), "x" * 255))
    path = folder / name
    odd_file(path, rnd)
    plan = material.plan(rnd)
    use_command(*rnd.choice((
        ("inspect", path),
        ("run", "--engine", path),
        ("build", path, "-o", folder / "b.plan"),
        ("run", "--engine", plan, "--task", "encode", "--input", path, "-o", folder / "o.npz"),
        ("run", "--engine", plan, "--task", "decode", "--input", path, "-o", folder / "o.png"),
        ("run", "--engine", plan, "--task", "inpaint", "--input", path, "--mask", path, "-o", folder / "o.png"),
        ("inspect", plan, "--extract", path),
    )))  # fmt: skip


def picture(path: Path, rnd: random.Random) -> None:
    """An image file of any mode, size and format, which may be damaged."""
    mode = rnd.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "I", "F", "I;16", "CMYK", "LA", "YCbCr"))
    size = rnd.choice(((32, 32), (1, 1), (1, 500), (640, 480), (33, 31), (3000, 2)))
    image = Image.new(mode, size, rnd.choice((0, 1, 200)) if mode != "F" else rnd.choice((0.5, float("nan"))))
    stream = io.BytesIO()
    fmt = rnd.choice(("PNG", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"))
    try:
        frames = [image.copy() for _ in range(3)] if fmt in ("GIF", "TIFF", "WEBP") and rnd.random() < 0.3 else []
        image.save(stream, fmt, **({"save_all": True, "append_images": frames} if frames else {}))
    except (OSError, ValueError, KeyError):
        image.convert("RGB").save(stream, "PNG")
    content = stream.getvalue()
    kind = rnd.randrange(5)
    if kind == 0:
        content = mutate_bytes(content, rnd)
    elif kind == 1:
        content = content[: rnd.randrange(len(content))]
    elif kind == 2 and content.startswith(b"\x89PNG"):
        wide = struct.pack(">II", rnd.choice((10**5, 2**31 - 1, 0)), rnd.choice((10**5, 1)))
        content = content[:16] + wide + content[24:]
    path.write_bytes(content)


def image(rnd: random.Random, material: Material, folder: Path) -> None:
    """Images, masks and folders of them, as inputs of tasks."""
    source = folder / rnd.choice(("a.png", "b.jpg", "c", "\x1b[31m.png", ".hidden.png"))
    picture(source, rnd)
    picture(folder / "mask.png", rnd)
    given = rnd.choice((source, source, folder))
    task = rnd.choice(("encode", "reconstruct", "inpaint", "features", "resample"))
    extra = ("--mask", folder / "mask.png") if task == "inpaint" and rnd.random() < 0.6 else ()
    suffix = "npz" if task in ("encode", "features") else "png"
    use_command(
        "run",
        "--engine",
        material.plan(rnd),
        "--device",
        "cpu",
        "--task",
        task,
        "--input",
        given,
        *extra,
        "-o",
        folder / f"out.{suffix}",
    )


def codes(rnd: random.Random, material: Material, folder: Path) -> None:
    """Archives of codes."""
    file, stream = folder / "codes.npz", io.BytesIO()
    shape = rnd.choice(
        ((1, 8, 8, 4), (1, 4, 4, 4), (1, 8, 8, 1), (1, 80), (0, 8, 8, 4), (), (1, 8, 8), (2**10,), (1,) * 30)
    )
    dtype = rnd.choice(
        (np.int64, np.int64, np.int32, np.uint8, np.float32, np.bool_, "U3", "M8[s]", np.complex64, object)
    )
    array = np.zeros(shape, dtype)
    if np.dtype(dtype).kind in "iuf" and array.size:
        array.reshape(-1)[0] = rnd.choice((0, 3, 255, 7))
    np.savez(stream, **{rnd.choice(("codes", "codes", "codes", "other")): array})
    content = stream.getvalue()
    file.write_bytes(mutate_bytes(content, rnd) if rnd.random() < 0.5 else content)
    use_command(
        "run",
        "--engine",
        material.plan(rnd),
        "--device",
        "cpu",
        "--task",
        "decode",
        "--input",
        file,
        "-o",
        folder / "out.png",
    )


def checkpoint(rnd: random.Random, material: Material, folder: Path) -> None:
    """Checkpoint folders in which something was changed."""
    from vqdeploy import checkpoint as checkpoints

    shipped = [path for path in sorted(checkpoints.SHIPPED.glob("*/tiny")) if path.parent.name in material.systems]
    source = rnd.choice(shipped)
    target = folder / "checkpoint"
    shutil.copytree(source, target)
    kind = rnd.randrange(4)
    if kind < 2:
        data = json.loads((target / "config.json").read_text())
        mutate_json(data, rnd)
        (target / "config.json").write_text(to_text(data))
    elif kind == 2:
        file = target / "model.safetensors"
        file.write_bytes(mutate_weights(file.read_bytes(), rnd))
    else:
        odd_file(target / rnd.choice(("config.json", "model.safetensors")), rnd)
    checkpoints.load(target)


def arguments(rnd: random.Random, material: Material, folder: Path) -> None:
    """Command lines."""
    verb = rnd.choice(
        (
            "run",
            "run",
            "run",
            "run",
            "inspect",
            "models",
            "env",
            "build",
            "nosuch",
            "",
            "--help",
            "export",
            "verify",
            "bench",
            "train",
            "tokenize",
            "triton",
        )
    )
    words = ["--task", "--label", "--num-images", "--seed", "--temperature", "--top-k", "--top-p", "--guidance-scale"]
    words += [
        "--steps",
        "--schedule",
        "--choice-temperature",
        "--input",
        "--mask",
        "--mask-ratio",
        "--depth",
        "--device",
    ]
    words += ["--keep-levels", "--columns", "--layer", "--film", "--threads", "--json", "--help", "--nosuch", "-o"]
    words += ["--held-out", "--shard-size", "--slots", "--completions"]
    # Outputs go to the folder, whatever the arguments.
    values: list[Any] = ["0", "1", "-1", "1.5", "nan", "inf", "1e400", "9" * 5000, "", "\x1b[31m", "\ud800", "a" * 5000]
    values += [
        "0.5,0.5",
        "1,2,3,4",
        ",",
        "generate",
        "encode",
        "decode",
        "inpaint",
        "resample",
        "features",
        "cpu",
        "linear",
    ]
    values += [str(folder / "x.png"), str(folder), "3", "2", "0x10", "1_0", "٣"]
    line: list[Any] = [verb]
    if verb == "run":
        line += ["--engine", material.plan(rnd), "-o", folder / "out.png"]
    elif verb == "inspect":
        line += [material.plan(rnd)]
    elif verb == "triton":
        line += [rnd.choice((material.plan(rnd), folder, *values)), "-o", folder / "repository"]
    elif verb == "tokenize":
        engine, data = rnd.choice((material.plan(rnd), *values)), rnd.choice((folder, *values))
        line += ["--engine", engine, "--input", data, "-o", folder / "codes", "--workers", "1"]
    elif verb in ("export", "verify", "bench", "train", "build"):
        line += {
            "export": ["--model", rnd.choice(values), "-o", folder / "p"],
            "train": ["--model", rnd.choice(values), "-o", folder / "c"],
            "build": [rnd.choice((folder, *values)), "-o", folder / "x.plan"],
        }.get(verb, ["--engine", rnd.choice(("", *values, str(folder)))])
    for _ in range(rnd.randrange(4)):
        line += [rnd.choice(words)]
        if rnd.random() < 0.8:
            line += [rnd.choice(values)]
    with contextlib.chdir(folder):
        use_command(*line)


def api(rnd: random.Random, material: Material, _: Path) -> None:
    """Arguments from Python."""
    odd: list[Any] = [
        None,
        -1,
        0,
        1,
        3,
        2**40,
        1.5,
        float("nan"),
        "x",
        "\x1b[31m",
        [],
        [0],
        [0, 1],
        [-1],
        [[0]],
        [None],
        {},
        b"x",
        True,
    ]
    odd += [
        np.zeros(shape, dtype)
        for shape in ((), (1, 32, 32, 3), (1, 8, 8, 4), (2, 5))
        for dtype in (np.uint8, np.int64, np.float32, object, "U2")
    ]
    odd += [np.full((1, 8, 8, 4), 2**62), np.array(["a"]), "9" * 5000, np.float32("nan"), np.int64(3), range(3), 10**30]
    with load(material.plan(rnd), device="cpu", threads=1) as pipeline:
        name = rnd.choice(
            (
                "encode",
                "decode",
                "reconstruct",
                "generate",
                "inpaint",
                "resample",
                "features",
                "complete",
                "label",
                "maps",
                "run",
                "options",
                "unknown",
            )
        )
        keywords = (
            *OPTIONS,
            "seed",
            "first_image",
            "num_images",
            "mask",
            "mask_ratio",
            "completions",
            "keep",
            "depth",
            "nosuch",
        )
        given = {rnd.choice(keywords): rnd.choice(odd) for _ in range(rnd.randrange(3))}
        position = [rnd.choice(odd) for _ in range(rnd.choice((1, 1, 2)))]
        if name == "run":
            position, given = (
                [rnd.choice((*pipeline.stages, "x"))],
                {rnd.choice(("image", "codes", "x")): rnd.choice(odd)},
            )
        if name in ("generate", "complete", "inpaint", "resample") and "steps" not in given:
            given |= {"steps": 2} if "steps" in pipeline.sampling.options else {}
        try:
            getattr(pipeline, name)(*position, **given)
        except TypeError as error:
            # Python's own words for a call that fits no signature.
            if "argument" not in str(error) or name + "()" not in str(error):
                raise


KINDS: dict[str, Callable[[random.Random, Material, Path], None]] = {
    "plan bytes": plan_bytes,
    "plan directory": plan_directory,
    "plan manifest": plan_manifest,
    "plan graph": plan_graph,
    "plan interface": plan_interface,
    "plan graph bytes": plan_graph_bytes,
    "plan node": plan_node,
    "plan weights": plan_weights,
    "package": package,
    "odd paths": odd_paths,
    "image": image,
    "codes": codes,
    "checkpoint": checkpoint,
    "arguments": arguments,
    "api": api,
}


def run_case(kind: str, number: int, material: Material, folder: Path) -> str:
    """Runs one case in an empty folder; `ok`, `refused`, or the fault."""
    rnd = random.Random(f"{kind} {number}")  # noqa: S311
    try:
        KINDS[kind](rnd, material, folder)
    except VqdeployError as error:
        try:
            check_message(str(error))
        except Fault as fault:
            return str(fault)
        return "refused"
    except Fault as fault:
        return str(fault)
    except MemoryError:
        return "memory: MemoryError"
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {str(error)[:150]!a} at {Path(where.filename).name}:{where.lineno}"
    return "ok"
