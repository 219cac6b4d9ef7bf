"""`PackedAttention` in both bodies against the PyTorch operator."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper

from vqdeploy.engines.bodies_onnxrt import swap_in
from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.models import ops

BODIES = ("portable", "onnxrt")


def attend(body: str, heads: int, qkv: np.ndarray) -> np.ndarray:
    attributes = {"plugin_namespace": DOMAIN, "plugin_version": "1", "heads": heads}
    node = helper.make_node("PackedAttention", ["qkv"], ["attention"], domain=DOMAIN, **attributes)
    tensors = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}{i}" for i in "bsw"]) for n in ("qkv", "attention")
    ]
    model = helper.make_model(
        helper.make_graph([node], "attention", tensors[:1], tensors[1:]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[function("PackedAttention", heads=heads)],
        ir_version=10,
    )
    checker.check_function(model.functions[0])
    if body == "onnxrt":
        swap_in(model, heads=0)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"qkv": qkv})[0]


@pytest.mark.parametrize("body", BODIES)
@given(data=st.data())
def test_against_pytorch(body, data):
    batch, length, heads = (data.draw(st.integers(1, most)) for most in (4, 40, 4))
    width = heads * data.draw(st.sampled_from([1, 8, 24, 64]))
    qkv = torch.randn(batch, length, 3 * width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    expected = ops.packed_attention(qkv, heads).numpy()
    np.testing.assert_allclose(attend(body, heads, qkv.numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_large_scores_do_not_overflow(body):
    qkv = 100 * torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    expected = ops.packed_attention(qkv, 2).numpy()
    np.testing.assert_allclose(attend(body, 2, qkv.numpy()), expected, rtol=1e-4)
