"""Packages that are broken on purpose, and what `verify` says of them."""

import json
import struct

import numpy as np
import onnx
from onnx import helper

from vqdeploy.runtime.bundle import sha256
from vqdeploy.runtime.manifest import FILE, WEIGHTS
from vqdeploy.runtime.noise import gumbel


def reseal(folder):
    """Makes the digests fit again, as someone who knows how would."""
    data = json.loads((folder / FILE).read_text())
    data["members"] = {name: sha256(folder / name) for name in data["members"]}
    (folder / FILE).write_text(json.dumps(data))


def change_weight(folder, weight, change):
    """Changes a tensor in the weights file, found by its value."""
    blob = bytearray((folder / WEIGHTS).read_bytes())
    (size,) = struct.unpack("<Q", blob[:8])
    start = blob.index(weight.detach().contiguous().numpy().tobytes(), 8 + size)
    array = np.frombuffer(blob, weight.detach().numpy().dtype, weight.numel(), start).reshape(weight.shape)
    change(array)
    (folder / WEIGHTS).write_bytes(blob)
    reseal(folder)


def change_function(folder, stage, name, change):
    """Changes the nodes of a function in the graph of a stage; `change` maps a node to its replacement or None."""
    model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    (function,) = [f for f in model.functions if f.name == name]
    nodes = [(node, change(node)) for node in function.node]
    assert any(new is not None for _, new in nodes)
    del function.node[:]
    function.node.extend(node if new is None else new for node, new in nodes)
    onnx.save(model, folder / f"{stage}.onnx")
    reseal(folder)


def change_graph(folder, stage, change):
    """Changes the nodes of a stage; `change` maps a node to its replacement or None."""
    model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    nodes = [(node, change(node)) for node in model.graph.node]
    assert any(new is not None for _, new in nodes)
    del model.graph.node[:]
    model.graph.node.extend(node if new is None else new for node, new in nodes)
    onnx.save(model, folder / f"{stage}.onnx")
    reseal(folder)


def failures(report):
    assert report["passed"] == (not [c for c in report["checks"] if not c["passed"]])
    return {f"{check['stage']}: {check['metric']}" for check in report["checks"] if not check["passed"]}


def failed(found, *expected):
    """Each of the expected metrics, given by their first words, is among those that failed."""
    for metric in expected:
        assert any(name.startswith(metric) for name in found), f"{metric} is not among {sorted(found)}"


def replace_with(output, operator, *inputs):
    """Replaces the node that makes `output`."""
    return lambda node: helper.make_node(operator, list(inputs), [output]) if node.output[0] == output else None


def change_noise(monkeypatch, change):
    """Loaded plans draw from other keys: `change` maps those of the images of a step."""
    draw = lambda keys, rows: gumbel(change(keys), rows)  # noqa: E731
    monkeypatch.setattr("vqdeploy.runtime.pipeline.ThreadedNoise", lambda threads: draw)


def by_place(keys):
    """Keyed by the place in the batch."""
    return [(seed, place, step) for place, (seed, _, step) in enumerate(keys)]
