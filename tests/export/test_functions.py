"""The ONNX function of each operator on ONNX Runtime against the PyTorch operator, in both bodies."""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vqdeploy.engines.bodies_onnxrt import swap_in
from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.models.ops import truncate
from vqdeploy.models.quantizers import MultichannelQuantizer

ops = torch.ops.vqdeploy
BODIES = ("portable", "onnxrt")
FLOAT, FLOAT16, INT64, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT8
SAMPLING = {
    "logits": (FLOAT, 2),
    "noise": (FLOAT, 2),
    "temperature": (FLOAT, 1),
    "top_k": (INT64, 1),
    "top_p": (FLOAT, 1),
}
CACHES = {"past_key": (FLOAT, 4), "past_value": (FLOAT, 4)}
SIGNATURES = {
    "VQNearest": ({"z": (FLOAT, 2), "codebook": (FLOAT, 2)}, {"codes": (INT64, 1)}),
    "VQResidual": ({"z": (FLOAT, 2), "codebook": (FLOAT, 2)}, {"codes": (INT64, 2), "quantized": (FLOAT, 2)}),
    "VQLookup": ({"codes": (INT64, 2), "codebook": (FLOAT, 2)}, {"vectors": (FLOAT, 2)}),
    "CachedAttention": (
        {"qkv": (FLOAT, 3), **CACHES, "position": (INT64, 1)},
        {"attention": (FLOAT, 3), "present_key": (FLOAT, 4), "present_value": (FLOAT, 4)},
    ),
    "QuantizedCachedAttention": (
        {
            "qkv": (FLOAT, 3),
            "past_key": (INT8, 4),
            "past_value": (INT8, 4),
            "position": (INT64, 1),
            "key_scale": (FLOAT, 4),
            "value_scale": (FLOAT, 4),
        },
        {"attention": (FLOAT, 3), "present_key": (INT8, 4), "present_value": (INT8, 4)},
    ),
    "WriteCache": ({"past": (FLOAT, 4), "entries": (FLOAT, 4), "position": (INT64, 1)}, {"present": (FLOAT, 4)}),
    "GumbelSample": (SAMPLING, {"codes": (INT64, 1)}),
}


def values(tensors: dict) -> list[onnx.ValueInfoProto]:
    """Every dimension stays open, but ONNX Runtime's attention wants to know the heads of its caches."""
    return [
        helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)])
        for name, (kind, rank) in tensors.items()
    ]


def single_node(
    name: str, depth: int = 4, metric: str = "l2", half: bool = False, shared: bool = True
) -> onnx.ModelProto:
    """A model of one node and its function; without `shared` there is a codebook a depth."""
    inputs, outputs = SIGNATURES[name]
    if not shared:
        inputs = inputs | {"codebook": (FLOAT, 3)}
    if half:
        inputs, outputs = (
            {key: (FLOAT16 if kind == FLOAT else kind, rank) for key, (kind, rank) in tensors.items()}
            for tensors in (inputs, outputs)
        )
    own = {"VQResidual": {"depth": depth, "metric": metric}, "VQNearest": {"metric": metric}}.get(name, {})
    attributes = {"plugin_namespace": DOMAIN, "plugin_version": "1"} | own
    node = helper.make_node(name, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    return helper.make_model(
        helper.make_graph([node], name, values(inputs), values(outputs)),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[function(name, **own, **({"shared": shared} if name in ("VQResidual", "VQLookup") else {}))],
        ir_version=10,
    )


@cache
def session(name: str, body: str = "portable", heads: int = 1, **kind: object) -> ort.InferenceSession:
    """`single_node` on ONNX Runtime."""
    model = single_node(name, **kind)
    if body == "onnxrt":
        swap_in(model, heads)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(name: str, *arguments: np.ndarray | torch.Tensor, **kind: object) -> list[np.ndarray]:
    feed = dict(zip(SIGNATURES[name][0], map(np.asarray, arguments), strict=True))
    return session(name, **kind).run(None, feed)


class TestNearest:
    @given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 50), st.booleans(), st.integers(0, 2**31))
    def test_finds_the_codes_of_the_torch_operator(self, count, dim, size, half, seed):
        generator = torch.Generator().manual_seed(seed)
        # On a lattice every product is exact, so that ties are ties in any order of summation.
        kind = torch.float16 if half else torch.float32
        z = (torch.randint(-8, 9, (count, dim), generator=generator) / 4).to(kind)
        codebook = (torch.randint(-4, 5, (size, dim), generator=generator) / 4).to(kind)
        (codes,) = run("VQNearest", z, codebook, half=half)
        np.testing.assert_array_equal(codes, ops.nearest(z, codebook, "l2"))
        distances = (z.double()[:, None] - codebook.double()).square().sum(-1)
        first = [row.index(min(row)) for row in distances.tolist()]
        np.testing.assert_array_equal(codes, first)

    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    @given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
    def test_chooses_the_nearest_vector_up_to_rounding(self, metric, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        z, codebook = (torch.randn(n, 16, generator=generator, dtype=torch.double) * scale for n in (50, 64))
        codes = torch.from_numpy(run("VQNearest", z.float(), codebook.float(), metric=metric)[0])
        torch_codes = ops.nearest(z.float(), codebook.float(), metric)
        if metric == "cosine":
            z, codebook = (torch.nn.functional.normalize(x, dim=1) for x in (z, codebook))
        distances = torch.cdist(z, codebook).square()
        for found in (codes, torch_codes):
            chosen = distances.gather(1, found[:, None])[:, 0]
            assert ((chosen - distances.amin(1)) <= 1e-5 * distances.amax(1)).all()

    def test_the_cosine_of_half_precision_is_reckoned_in_fp32(self):
        generator = torch.Generator().manual_seed(0)
        z, codebook = (torch.randn(n, 64, generator=generator).half() for n in (200, 500))
        (codes,) = run("VQNearest", z, codebook, metric="cosine", half=True)
        (same,) = run("VQNearest", z.float(), codebook.float(), metric="cosine")
        np.testing.assert_array_equal(codes, same)
        np.testing.assert_array_equal(codes, ops.nearest(z, codebook, "cosine"))

    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_a_tie_goes_to_the_lowest_index(self, metric):
        codebook = torch.tensor([[-3.0, -4.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        z = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        (codes,) = run("VQNearest", z, codebook, metric=metric)
        assert codes.tolist() == ops.nearest(z, codebook, metric).tolist() == [1, 3, 1]

    def test_lengths_count_for_distances_and_not_for_angles(self):
        codebook = torch.tensor([[9.0, 9.0], [1.0, 0.5], [4.0, 4.0], [0.0, 1.0]])
        z = torch.tensor([[1.0, 1.0], [50.0, 50.0], [0.25, 0.25]])
        found = {metric: run("VQNearest", z, codebook, metric=metric)[0].tolist() for metric in ("l2", "cosine")}
        assert found == {"l2": [1, 0, 1], "cosine": [0, 0, 0]}
        assert found == {metric: ops.nearest(z, codebook, metric).tolist() for metric in found}

    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_zero_vectors(self, metric):
        """Of a zero vector every angle is the same, and the angle to a zero code is a right one."""
        z = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
        codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        (codes,) = run("VQNearest", z, codebook, metric=metric)
        assert codes.tolist() == ops.nearest(z, codebook, metric).tolist() == [int(metric == "l2"), 0, 1]


METRICS = ("l2", "cosine", "dot")


class TestBodyOfOnnxRuntime:
    """Searches in blocks of vectors and of codes find what the portable body finds."""

    @pytest.mark.parametrize("name", ["VQNearest", "VQResidual"])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", [1, 63, 64, 192, 8192])
    def test_every_vector_is_found_where_it_lies_first(self, name, metric, size):
        """A codebook that is known when the plan is built, with every vector in it twice."""
        codebook = np.random.default_rng(size).integers(-3, 4, (size, 2)).astype(np.float32)
        z = np.concatenate([codebook[::7], codebook[-1:]])
        found = []
        for body in BODIES:
            model = single_node(name, metric=metric)
            del model.graph.input[1]
            model.graph.initializer.append(numpy_helper.from_array(codebook, "codebook"))
            if body == "onnxrt":
                swap_in(model, 1)
            found.append(ort.InferenceSession(model.SerializeToString()).run(None, {"z": z})[0])
        np.testing.assert_array_equal(*found)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize(("count", "size"), [(0, 5), (1, 1), (3, 65), (4097, 64), (5000, 100), (300, 4096)])
    def test_vectors_that_fill_blocks_or_do_not(self, metric, shared, half, count, size):
        rng = np.random.default_rng(count)
        z = (rng.integers(-8, 9, (count, 6)) / 4).astype(np.float16 if half else np.float32)
        codebook = (rng.integers(-4, 5, (size, 6) if shared else (3, size, 6)) / 4).astype(np.float32)
        if metric == "cosine":  # whose lengths divide exactly, so that equal angles are equal
            codebook = np.eye(6, dtype=np.float32)[rng.integers(0, 6, codebook.shape[:-1])] * 2
        kind = {"depth": 3, "metric": metric, "shared": shared}
        expected = ops.residual_quantize(torch.from_numpy(z), torch.from_numpy(codebook), 3, metric)
        for body in BODIES:
            model = single_node("VQResidual", half=half, **kind)
            model.graph.input[1].type.tensor_type.elem_type = FLOAT
            if body == "onnxrt":
                swap_in(model, 1)
            found = ort.InferenceSession(model.SerializeToString()).run(None, {"z": z, "codebook": codebook})
            for own, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(own, theirs)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
    def test_no_code_lies_outside_whatever_the_vectors(self, value):
        z, codebook = np.full((3, 2), value, np.float32), np.ones((5, 2), np.float32)
        (codes,) = run("VQNearest", z, codebook, body="onnxrt")
        assert ((codes >= 0) & (codes < 5)).all()


class TestResidual:
    @pytest.mark.parametrize("shared", [True, False])
    @given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 50), st.integers(1, 5), st.integers(0, 2**31))
    def test_finds_the_codes_of_the_torch_operator(self, shared, count, dim, size, depth, seed):
        generator = torch.Generator().manual_seed(seed)
        # On a lattice every product is exact, so that ties are ties in any order of summation.
        z = torch.randint(-8, 9, (count, dim), generator=generator) / 4
        codebook = torch.randint(-4, 5, (size, dim) if shared else (depth, size, dim), generator=generator) / 4
        codes, quantized = run("VQResidual", z, codebook, depth=depth, shared=shared)
        expected, vectors = ops.residual_quantize(z, codebook, depth, "l2")
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(quantized, vectors)

    @given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
    def test_chooses_the_nearest_vector_up_to_rounding(self, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        z, codebook = (torch.randn(n, 16, generator=generator, dtype=torch.double) * scale for n in (50, 64))
        codes, quantized = map(torch.from_numpy, run("VQResidual", z.float(), codebook.float()))
        residual = z
        for code in codes.T:
            distances = torch.cdist(residual, codebook).square()
            chosen = distances.gather(1, code[:, None])[:, 0]
            assert ((chosen - distances.amin(1)) <= 1e-5 * distances.amax(1)).all()
            residual = residual - codebook[code]
        torch.testing.assert_close(quantized.double(), z - residual, rtol=1e-5, atol=1e-5 * scale)

    def test_a_tie_goes_to_the_lowest_index(self):
        codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])  # the last is as near to rows 1, 2, 3 and 4
        codes, _ = run("VQResidual", z, codebook, depth=2)
        assert codes.tolist() == ops.residual_quantize(z, codebook, 2, "l2")[0].tolist() == [[1, 4], [3, 4], [1, 3]]

    @pytest.mark.parametrize("value", [1e6, -1e6, 0.0, 1e-20])
    def test_extreme_vectors(self, value):
        z, codebook = torch.full((3, 8), value), torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        codes, quantized = run("VQResidual", z, codebook)
        expected, vectors = ops.residual_quantize(z, codebook, 4, "l2")
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(quantized, vectors)


class TestLookup:
    @given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 50), st.integers(1, 5), st.integers(0, 2**31))
    def test_sums_the_rows(self, count, dim, size, depth, seed):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-1, size, (count, depth), generator=generator)
        codebook = torch.randn(size, dim, generator=generator)
        (vectors,) = run("VQLookup", codes, codebook)
        np.testing.assert_allclose(vectors, ops.lookup(codes, codebook), atol=1e-5)

    def test_minus_one_adds_nothing(self):
        codebook = torch.tensor([[100.0, 200.0], [1.0, 2.0], [10.0, 20.0]])
        (vectors,) = run("VQLookup", torch.tensor([[1, 2], [1, -1], [-1, -1]]), codebook)
        assert vectors.tolist() == [[11, 22], [1, 2], [0, 0]]

    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_channels_are_looked_up_one_by_one(self, metric):
        torch.manual_seed(0)
        quantizer = MultichannelQuantizer(10, 12, groups=4, metric=metric)
        codes = torch.randint(0, 10, (2, 3, 5, 4))
        table = quantizer.codebook
        if metric == "cosine":
            table = table / table.norm(dim=1, keepdim=True)
        (vectors,) = run("VQLookup", codes.reshape(-1, 1), table)
        expected = quantizer.decode(codes)
        np.testing.assert_allclose(vectors.reshape(2, 3, 5, 12), expected, atol=1e-6)
        torch.testing.assert_close(expected[1, 2, 3, 6:9], table[codes[1, 2, 3, 2]])


def attention_inputs(batch, length, heads, dim, places, positions, seed):
    """Random inputs, and garbage in every place that is still empty."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, length, 3 * heads * dim, generator=generator)
    key, value = torch.randn(2, batch, heads, places, dim, generator=generator).unbind()
    position = torch.tensor(positions)
    empty = torch.arange(places) >= position[:, None]
    for cache_ in (key, value):
        cache_.masked_fill_(empty[:, None, :, None], 1e4)
    return qkv, key, value, position


def one_entry(data, inputs):
    """Number of heads, and inputs for one entry at a position of each sample."""
    batch, heads = data.draw(st.integers(1, 5), "batch"), data.draw(st.integers(1, 4), "heads")
    places, dim = data.draw(st.integers(1, 20), "places"), 8 * data.draw(st.integers(1, 4), "dim / 8")
    positions = data.draw(st.lists(st.integers(0, places - 1), min_size=batch, max_size=batch), "positions")
    return heads, *inputs(batch, 1, heads, dim, places, positions, data.draw(st.integers(0, 2**31), "seed"))


def attend(body, heads, qkv, key, value, position, *scales):
    """One call with caches that are updated in place, as the runtime makes it; returns the output and the caches."""
    kind = "QuantizedCachedAttention" if scales else "CachedAttention"
    names, (batch, length, width) = SIGNATURES[kind], qkv.shape
    bound = session(kind, body, heads=heads).io_binding()
    feed = zip(names[0], (qkv, key.clone(), value.clone(), position, *scales), strict=True)
    feed = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in feed}
    for name, x in feed.items():
        bound.bind_ortvalue_input(name, x)
    attention = ort.OrtValue.ortvalue_from_numpy(np.empty((batch, length, width // 3), np.float32))
    for name, x in zip(names[1], (attention, feed["past_key"], feed["past_value"]), strict=True):
        bound.bind_ortvalue_output(name, x)
    session(kind, body, heads=heads).run_with_iobinding(bound)
    return [torch.from_numpy(x.numpy().copy()) for x in (attention, feed["past_key"], feed["past_value"])]


def check_attention(body, heads, qkv, key, value, position):
    attention, keys, values_ = attend(body, heads, qkv, key, value, position)
    expected = ops.cached_attention(qkv, key, value, position)
    np.testing.assert_allclose(attention, expected[0], atol=2e-5)
    np.testing.assert_array_equal(keys, expected[1])
    np.testing.assert_array_equal(values_, expected[2])


class TestCachedAttention:
    @pytest.mark.parametrize("body", BODIES)
    @given(data=st.data())
    def test_one_entry_at_a_position_of_each_sample(self, body, data):
        check_attention(body, *one_entry(data, attention_inputs))

    @pytest.mark.parametrize("body", BODIES)
    @given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 5), st.integers(0, 2**31))
    def test_a_prefix_is_causal(self, body, batch, length, spare, seed):
        check_attention(body, 2, *attention_inputs(batch, length, 2, 16, length + spare, [0] * batch, seed))

    @given(st.integers(2, 5), st.integers(0, 2**31), st.lists(st.integers(0, 7), min_size=3, max_size=3))
    def test_the_portable_body_takes_a_chunk_at_any_position(self, length, seed, positions):
        check_attention("portable", 2, *attention_inputs(3, length, 2, 8, 12, positions, seed))

    @pytest.mark.parametrize("body", BODIES)
    def test_later_positions_have_no_influence(self, body):
        qkv, key, value, position = attention_inputs(2, 1, 2, 8, 6, [0, 3], 0)
        clean = [c.masked_fill((torch.arange(6) >= position[:, None])[:, None, :, None], 0) for c in (key, value)]
        dirty = attend(body, 2, qkv, key, value, position)
        np.testing.assert_array_equal(dirty[0], attend(body, 2, qkv, *clean, position)[0])

    @pytest.mark.parametrize("body", BODIES)
    def test_entries_one_by_one_give_what_the_prefix_gives(self, body):
        qkv, key, value, _ = attention_inputs(2, 5, 2, 8, 5, [0, 0], 0)
        whole = attend(body, 2, qkv, key, value, torch.zeros(2, dtype=torch.int64))
        for i in range(5):
            step = attend(body, 2, qkv[:, i : i + 1], key, value, torch.full((2,), i))
            np.testing.assert_allclose(step[0][:, 0], whole[0][:, i], atol=1e-5)
            key, value = step[1:]
        np.testing.assert_array_equal(key, whole[1])

    @pytest.mark.parametrize("body", BODIES)
    def test_large_scores_do_not_overflow(self, body):
        qkv, key, value, position = attention_inputs(2, 1, 2, 8, 6, [2, 4], 0)
        check_attention(body, 2, qkv * 30, key * 30, value, position)


def by_numpy(qkv, key, value, position, key_scale, value_scale):
    """What `QuantizedCachedAttention` computes, in fp64, row by row."""
    (batch, length, _), (heads, _, dim) = qkv.shape, key.shape[1:]
    outputs, caches = np.zeros((batch, length, heads * dim)), [key.numpy().copy(), value.numpy().copy()]
    new = qkv.numpy().reshape(batch, length, 3, heads, dim)
    scales = [scale.numpy()[0, :, 0] for scale in (key_scale, value_scale)]
    for row in range(batch):
        start = int(position[row])
        for number, (cache_, scale) in enumerate(zip(caches, scales, strict=True), 1):
            integers = np.clip(np.rint(new[row, :, number] / scale), -128, 127)
            cache_[row, :, start : start + length] = integers.astype(np.int8).swapaxes(0, 1)
        for place, head in np.ndindex(length, heads):
            seen = slice(0, start + place + 1)
            keys, values_ = (
                c[row, head, seen] * s[head].astype(np.float64) for c, s in zip(caches, scales, strict=True)
            )
            scores = keys @ new[row, place, 0, head].astype(np.float64)
            weights = np.exp(scores - scores.max())
            outputs[row, place, head * dim : head * dim + dim] = weights / weights.sum() @ values_
    return outputs, *caches


def quantized_inputs(batch, length, heads, dim, places, positions, seed):
    """Random inputs, some beyond what the caches hold, and garbage in every place that is still empty."""
    qkv, *_, position = attention_inputs(batch, length, heads, dim, places, positions, seed)
    generator = torch.Generator().manual_seed(seed)
    caches = torch.randint(-128, 128, (2, batch, heads, places, dim), generator=generator).to(torch.int8)
    scales = torch.rand(2, 1, heads, 1, dim, generator=generator) * 0.03 + 0.01
    return qkv, *caches, position, *scales


def check_quantized(body, heads, *inputs):
    expected, found = by_numpy(*inputs), attend(body, heads, *inputs)
    for caches in zip(expected[1:], found[1:], strict=True):  # halves may be rounded either way
        assert np.abs(np.subtract(*(c.astype(int) for c in map(np.asarray, caches)))).max() <= 1
        assert np.mean(np.not_equal(*map(np.asarray, caches))) < 1e-2
    np.testing.assert_allclose(found[0], expected[0], atol=5e-3)


@pytest.mark.parametrize("body", BODIES)
class TestQuantizedCachedAttention:
    @given(data=st.data())
    def test_one_entry_at_a_position_of_each_sample(self, body, data):
        heads, *inputs = one_entry(data, quantized_inputs)
        check_quantized(body, heads, *inputs)
        operator = ops.quantized_cached_attention(*inputs)
        np.testing.assert_allclose(operator[0], by_numpy(*inputs)[0], atol=5e-3)

    @given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 5), st.integers(0, 2**31))
    def test_a_prefix_is_causal(self, body, batch, length, spare, seed):
        check_quantized(body, 2, *quantized_inputs(batch, length, 2, 16, length + spare, [0] * batch, seed))

    def test_a_row_does_not_depend_on_the_others(self, body):
        qkv, key, value, position, *scales = quantized_inputs(3, 1, 2, 16, 40, [30, 2, 17], 0)
        together = attend(body, 2, qkv, key, value, position, *scales)
        for row in range(3):
            own = [x[row : row + 1] for x in (qkv, key, value, position)]
            for alone, whole in zip(attend(body, 2, *own, *scales), together, strict=True):
                np.testing.assert_array_equal(alone[0], whole[row])


def write(body, past, entries, position):
    """One call that writes into the cache it is given, as the runtime makes it; returns the cache."""
    cache_ = ort.OrtValue.ortvalue_from_numpy(past.numpy().copy())
    bound = session("WriteCache", body).io_binding()
    bound.bind_ortvalue_input("past", cache_)
    bound.bind_cpu_input("entries", entries.numpy())
    bound.bind_cpu_input("position", position.numpy())
    bound.bind_ortvalue_output("present", cache_)
    session("WriteCache", body).run_with_iobinding(bound)
    return cache_.numpy().copy()


@pytest.mark.parametrize("body", BODIES)
class TestWriteCache:
    @given(data=st.data())
    def test_writes_at_a_position_of_each_sample(self, body, data):
        batch, heads, dim, length = (data.draw(st.integers(1, 5), name) for name in ("batch", "heads", "dim", "length"))
        places = length + data.draw(st.integers(0, 9), "spare")
        position = torch.tensor(data.draw(st.lists(st.integers(0, places - length), min_size=batch, max_size=batch)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
        past = torch.randn(batch, heads, places, dim, generator=generator)
        entries = torch.randn(batch, heads, length, dim, generator=generator)
        present = write(body, past, entries, position)
        np.testing.assert_array_equal(present, ops.write_cache(past, entries, position))
        np.testing.assert_array_equal(run("WriteCache", past, entries, position, body=body)[0], present)

    def test_leaves_everything_else_as_it_is(self, body):
        past, entries = torch.full((2, 1, 4, 1), np.nan), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
        present = write(body, past, entries, torch.tensor([3, 0]))
        assert np.argwhere(~np.isnan(present)).tolist() == [[0, 0, 3, 0], [1, 0, 0, 0]]
        assert (present[0, 0, 3, 0], present[1, 0, 0, 0]) == (1, 2)


def sample(body, logits, noise=None, temperature=1.0, top_k=None, top_p=1.0):
    """Codes of a body for options given as numbers or as one a row."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    rows, size = logits.shape
    options = [
        torch.broadcast_to(torch.as_tensor(value, dtype=kind), (rows,)).clone()
        for value, kind in (
            (temperature, torch.float32),
            (size if top_k is None else top_k, torch.int64),
            (top_p, torch.float32),
        )
    ]
    noise = torch.zeros(rows, size) if noise is None else torch.as_tensor(noise, dtype=torch.float32)
    if body == "torch":
        return ops.sample(logits, noise, *options).tolist()
    return run("GumbelSample", logits, noise, *options, body=body)[0].tolist()


def kept(body, logits, **options):
    """The codes that truncation leaves in: each in turn is pushed by noise, and wins if it is still there."""
    size = len(logits)
    winners = sample(body, [logits] * size, 1e6 * np.eye(size), **options)
    return {code for i, code in enumerate(winners) if code == i}


LOGITS = np.log([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize("body", [*BODIES, "torch"])
class TestTruncation:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"top_p": 0.79}, {1, 3}),
            ({"top_p": 0.81}, {0, 1, 3}),
            ({"top_p": 0.49}, {1}),
            ({"top_p": 1e-6}, {1}),
            ({"top_p": 0.0}, {1}),
            ({"top_p": 0.96}, {0, 1, 2, 3}),
            ({"top_p": 1.0}, {0, 1, 2, 3}),
            ({"top_k": 1}, {1}),
            ({"top_k": 3}, {0, 1, 3}),
            ({"top_k": 4}, {0, 1, 2, 3}),
            # top-k comes first: of .5 and .3 the first has .625
            ({"top_k": 2, "top_p": 0.6}, {1}),
            ({"top_k": 2, "top_p": 0.65}, {1, 3}),
            # temperature comes first: .25 .09 .0225 .0025 -> .685 .247
            ({"temperature": 0.5, "top_p": 0.68}, {1}),
            ({"temperature": 0.5, "top_p": 0.69}, {1, 3}),
        ],
    )
    def test_keeps(self, body, options, expected):
        assert kept(body, LOGITS, **options) == expected

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"top_k": 1}, {0}),
            ({"top_k": 2}, {0, 1, 2}),
            ({"top_k": 3}, {0, 1, 2}),
            ({"top_k": 4}, {0, 1, 2, 3}),
            ({"top_p": 0.6}, {0, 1, 2}),
        ],
    )
    def test_ties_are_kept(self, body, options, expected):
        assert kept(body, [2.0, 1.0, 1.0, 0.0], **options) == expected

    def test_equal_logits_are_all_kept_whatever_k_and_p(self, body):
        assert kept(body, [1.0] * 5, top_k=1, top_p=0.1) == {0, 1, 2, 3, 4}

    def test_options_of_a_row_are_its_own(self, body):
        noise = np.zeros((6, 4))
        noise[:, 2] = 100  # pushes the least likely code
        options = {
            "top_k": [4, 1, 4, 3, 4, 4],
            "top_p": [1, 1, 0.5, 1, 0.96, 0.79],
            "temperature": [1, 1, 1, 1, 1, 0.1],
        }
        noise[3, 0] = 200
        assert sample(body, [LOGITS] * 6, noise, **options) == [2, 1, 1, 0, 2, 1]

    @pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
    def test_temperature_divides_the_logits_and_not_the_noise(self, body, temperature):
        logits, noise = [[0.0, 0.5]], [[1.0, 0.0]]
        assert sample(body, logits, noise, temperature=temperature) == [int(0.5 / temperature > 1)]

    def test_without_noise_equal_logits_give_the_lowest_code(self, body):
        assert sample(body, [[0.0, 3.0, 3.0, 1.0]]) == [1]

    @pytest.mark.parametrize("scale", [1e-6, 1e4])
    def test_small_and_large_logits(self, body, scale):
        assert kept(body, np.array([3.0, 1.0, 2.0, 0.0]) * scale, top_k=2) == {0, 2}

    def test_one_code_to_choose_from(self, body):
        assert sample(body, [[0.3], [-2.0]], top_k=1, top_p=0.5) == [0, 0]


@st.composite
def requests(draw):
    """Rows of logits on a lattice, where neighbours are equal or clearly apart, and options of each row."""
    rows, size = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    spread = draw(st.integers(1, 80))
    logits = rng.integers(-spread, spread + 1, (rows, size)).astype(np.float32) / 8
    temperature = rng.choice(np.array([0.25, 0.5, 1, 2, 4], np.float32), rows)
    top_k = rng.choice([1, size, *rng.integers(1, size + 1, 3)], rows)
    top_p = rng.choice(np.array([1, 1e-4, *rng.random(3)], np.float32), rows)
    return logits, rng.gumbel(size=(rows, size)).astype(np.float32), temperature, top_k, top_p


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=60)
@given(request=requests())
def test_sampling_agrees_with_torch(body, request):
    logits, _noise, temperature, top_k, top_p = map(torch.from_numpy, request)
    # Bodies sum probabilities in different orders. Where p meets a prefix sum to the last bits, either is right.
    results = [truncate(logits, temperature, top_k, (top_p + shift).clamp(0, 1)) for shift in (-1e-5, 1e-5)]
    assume(torch.equal(*(torch.where(top_p[:, None] < 1, result, 0) for result in results)))
    assert run("GumbelSample", *request, body=body)[0].tolist() == ops.sample(*map(torch.from_numpy, request)).tolist()


FUNCTIONS = [
    *(function("VQResidual", depth=3, metric=m, shared=s) for m in ("l2", "cosine", "dot") for s in (True, False)),
    function("VQResidual", depth=1, metric="l2", shared=True),
    *(function("VQNearest", metric=metric) for metric in ("l2", "cosine", "dot")),
    function("PackedAttention", heads=4),
    *(function("VQLookup", shared=shared) for shared in (True, False)),
    *(function(name) for name in ("CachedAttention", "QuantizedCachedAttention", "WriteCache", "GumbelSample")),
]


def test_names_differ_from_those_of_onnx_operators():
    """TensorRT finds operators by name alone, whatever their domain."""
    assert not {function.name for function in FUNCTIONS if onnx.defs.has(function.name)}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_valid_onnx(function):
    onnx.checker.check_function(function)
