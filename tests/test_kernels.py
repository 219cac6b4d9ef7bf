"""Our kernels in Triton's interpreter against the ONNX functions, and their PTX, which needs no GPU either."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from vqdeploy.export.functions import DOMAIN, OPSET, function
from vqdeploy.models import ops
from vqdeploy.models.quantizers import MultichannelQuantizer

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install vqdeploy[kernels])")

from vqdeploy import kernels  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0 was asked for, so the kernels need a GPU"
)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXACT = pytest.mark.parametrize("kind", TYPES)
METRICS = pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])


@cache
def session(name: str, **attributes: object) -> ort.InferenceSession:
    """One node and its function on ONNX Runtime."""
    outputs = {"codes": TensorProto.INT64} | ({"quantized": TensorProto.FLOAT} if name == "VQResidual" else {})
    books = ["k", "d"] if attributes.get("shared", True) else ["q", "k", "d"]
    shapes = {"z": ["n", "d"], "codebook": books}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(name, ["z", "codebook"], list(outputs), domain=DOMAIN)],
        name,
        [info(key, TensorProto.FLOAT, shapes[key]) for key in ("z", "codebook")],
        [info(key, kind, None) for key, kind in outputs.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    body = function(name, **attributes)
    model = helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_function(name, z, codebook, **attributes):
    """The function makes fp32 of whatever it is given, so it is given that."""
    feed = {"z": z.float().numpy(), "codebook": codebook.float().numpy()}
    return [torch.from_numpy(output) for output in session(name, **attributes).run(None, feed)]


def lattice(kind, count, size, dim, seed=0):
    """Vectors whose products are exact in any order of summation, so that equal distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-8, 9, (count, dim), generator=generator) / 4
    codebook = torch.randint(-2, 3, (size, dim), generator=generator) / 2
    return z.to(TYPES[kind]), codebook.to(TYPES[kind])


def check_chosen(z, codebook, codes, metric="l2"):
    """Each code is within range, and as near as any up to rounding."""
    assert ((codes >= 0) & (codes < len(codebook))).all()
    z, codebook = z.double(), codebook.double()
    if metric == "dot":
        products = z @ codebook.T
        gap = products.amax(1) - products.gather(1, codes[:, None])[:, 0]
        assert (gap <= 1e-6 * z.norm(dim=1) * codebook.norm(dim=1).amax()).all()
        return
    if metric == "cosine":
        z, codebook = (torch.nn.functional.normalize(x, dim=1) for x in (z, codebook))
    distances = torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert (chosen - distances.amin(1) <= 1e-5 * (distances.amax(1) + z.square().sum(1))).all()


# Fewer vectors than a program takes, one more than some take; codebooks of one tile, parts of tiles and one vector.
SHAPES = [(1, 1, 4), (5, 3, 4), (16, 64, 16), (33, 130, 20), (17, 65, 33), (3, 70, 512)]


@needs_interpreter
class TestNearest:
    @EXACT
    @pytest.mark.parametrize(("count", "size", "dim"), SHAPES)
    def test_finds_the_codes_of_the_onnx_function(self, kind, count, size, dim):
        z, codebook = lattice(kind, count, size, dim)
        (expected,) = onnx_function("VQNearest", z, codebook, metric="l2")
        assert torch.equal(ops.nearest_on_cuda(z, codebook, "l2"), expected)

    @METRICS
    @EXACT
    @pytest.mark.parametrize(("count", "size", "dim"), SHAPES)
    def test_finds_the_nearest_of_random_vectors(self, metric, kind, count, size, dim):
        generator = torch.Generator().manual_seed(size)
        z, codebook = (torch.randn(n, dim, generator=generator).to(TYPES[kind]) for n in (count, size))
        codes = ops.nearest_on_cuda(z, codebook, metric)
        check_chosen(z, codebook, codes, metric)
        (expected,) = onnx_function("VQNearest", z, codebook, metric=metric)
        assert (codes != expected).sum() <= count // 16

    @METRICS
    def test_a_tie_goes_to_the_lowest_index_wherever_it_lies(self, metric):
        codebook = torch.eye(16).repeat(13, 1)[:200]  # every vector in every tile
        codes = ops.nearest_on_cuda(codebook.flip(0), codebook, metric)
        assert codes.tolist() == [place % 16 for place in range(199, -1, -1)]

    @METRICS
    def test_the_later_of_two_tiles_can_win(self, metric):
        z, codebook = torch.eye(4), torch.zeros(150, 4) - 1.0
        codebook[[20, 63, 64, 149]] = torch.eye(4)
        assert ops.nearest_on_cuda(z, codebook, metric).tolist() == [20, 63, 64, 149]

    @METRICS
    def test_of_equal_vectors_the_first_is_taken(self, metric):
        z, _ = lattice("fp32", 20, 1, 4)  # inexact products of equal columns round differently on some CPUs
        codebook = torch.full((300, 4), 0.25)
        assert ops.nearest_on_cuda(z, codebook, metric).tolist() == [0] * 20

    @METRICS
    @pytest.mark.parametrize(("kind", "scale"), [("fp16", 6e4), ("bf16", 1e16), ("fp32", 1e16), ("fp16", 1e-7)])
    def test_squares_that_its_type_cannot_hold(self, metric, kind, scale):
        generator = torch.Generator().manual_seed(0)
        z, codebook = ((torch.rand(n, 16, generator=generator) * 2 - 1) * scale for n in (20, 70))
        z, codebook = z.to(TYPES[kind]), codebook.to(TYPES[kind])
        if kind == "fp16":
            assert not torch.isin(z.square().amax(), torch.tensor([torch.inf, 0]), invert=True)
        codes = ops.nearest_on_cuda(z, codebook, metric)
        check_chosen(z, codebook, codes, metric)
        assert torch.equal(codes, onnx_function("VQNearest", z, codebook, metric=metric)[0])

    @pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
    @METRICS
    def test_no_code_lies_outside_whatever_the_vectors(self, metric):
        values = torch.tensor([3e38, -3e38, torch.inf, torch.nan, 0.0])
        z, codebook = values.repeat(4, 1).T.contiguous(), values.repeat(4).reshape(-1, 4)
        codes = ops.nearest_on_cuda(z, codebook, metric)
        assert ((codes >= 0) & (codes < len(codebook))).all()

    def test_zero_vectors_by_their_angle(self):
        z = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
        codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        codes = ops.nearest_on_cuda(z, codebook, "cosine")
        assert codes.tolist() == onnx_function("VQNearest", z, codebook, metric="cosine")[0].tolist() == [0, 0, 1]

    def test_lengths_count_for_distances_and_not_for_angles(self):
        codebook = torch.tensor([[8.0, 8.0], [1.0, 0.5], [4.0, 4.0], [0.0, 1.0]])
        z = torch.tensor([[1.0, 1.0], [50.0, 50.0], [0.25, 0.25]])
        found = {metric: ops.nearest_on_cuda(z, codebook, metric).tolist() for metric in ("l2", "cosine", "dot")}
        assert found == {"l2": [1, 0, 1], "cosine": [0, 0, 0], "dot": [0, 0, 0]}

    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_channels_are_quantized_apart(self, metric, groups):
        quantizer = MultichannelQuantizer(40, 32, groups, metric).eval()
        z = torch.randn(2, 3, 3, 32, generator=torch.Generator().manual_seed(0))
        codes = ops.nearest_on_cuda(z.reshape(-1, 32 // groups), quantizer.codebook, metric)
        assert torch.equal(codes.view(2, 3, 3, groups), quantizer.encode(z)[0])

    @pytest.mark.parametrize("rows", kernels.WARPS)
    def test_a_program_takes_as_many_vectors_as_it_is_told(self, rows):
        z, codebook = lattice("fp32", 130, 70, 20)
        codes = torch.empty(130, dtype=torch.int64)
        grid = (triton.cdiv(130, rows),)
        kernels.vq_nearest[grid](z, codebook, 130, 70, codes, METRIC="l2", **kernels._tiles(20, rows))
        assert torch.equal(codes, ops.nearest(z, codebook, "l2"))

    def test_vectors_may_lie_anywhere(self):
        z, codebook = lattice("fp32", 20, 40, 8)
        expected = ops.nearest(z, codebook, "l2")
        assert torch.equal(ops.nearest_on_cuda(z.T.contiguous().T, codebook.repeat(1, 2)[:, :8], "l2"), expected)
        assert ops.nearest_on_cuda(z[:0], codebook, "l2").shape == (0,)


@needs_interpreter
class TestResidual:
    @EXACT
    @pytest.mark.parametrize(
        ("depth", "shared", "metric"),
        [(1, True, "l2"), (4, True, "l2"), (2, True, "dot"), (3, False, "l2"), (2, False, "dot")],
    )
    @pytest.mark.parametrize(("count", "size", "dim"), [(1, 1, 4), (17, 70, 20)])
    def test_does_what_the_onnx_function_does(self, kind, metric, depth, shared, count, size, dim):
        z, codebook = lattice(kind, count, size if shared else depth * size, dim, depth)
        codebook = codebook if shared else codebook.view(depth, size, dim)
        codes, quantized = ops.residual_quantize_on_cuda(z, codebook, depth, metric)
        expected_codes, expected = onnx_function("VQResidual", z, codebook, depth=depth, metric=metric, shared=shared)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(quantized, expected.to(z.dtype))

    @pytest.mark.parametrize("shared", [True, False])
    def test_by_angle_what_is_subtracted_are_the_vectors_as_they_stand(self, shared):
        generator = torch.Generator().manual_seed(0)
        z, codebook = torch.randn(9, 16, generator=generator), 3 * torch.randn(2, 80, 16, generator=generator)
        codebook = codebook[0] if shared else codebook
        codes, quantized = ops.residual_quantize_on_cuda(z, codebook, 2, "cosine")
        residual, total = z, torch.zeros_like(z)
        for depth, code in enumerate(codes.unbind(1)):
            table = codebook if shared else codebook[depth]
            check_chosen(residual, table, code, "cosine")
            residual, total = residual - table[code], total + table[code]
        assert torch.equal(quantized, total)

    @EXACT
    @pytest.mark.parametrize("dim", [4, 48, 512])
    def test_each_depth_finds_the_nearest_of_random_vectors(self, kind, dim):
        generator = torch.Generator().manual_seed(dim)
        z, codebook = (torch.randn(n, dim, generator=generator).to(TYPES[kind]) for n in (9, 80))
        codes, quantized = ops.residual_quantize_on_cuda(z, codebook, 3, "l2")
        residual, total = z.float(), torch.zeros(9, dim)
        for code in codes.unbind(1):
            check_chosen(residual, codebook, code)
            residual, total = residual - codebook[code].float(), total + codebook[code].float()
        # The interpreter cuts off what bf16 cannot hold, where a GPU rounds.
        torch.testing.assert_close(quantized, total.to(z.dtype), rtol=2**-7 if kind == "bf16" else 0, atol=0)

    def test_a_tie_goes_to_the_lowest_index_at_every_depth(self):
        codebook = torch.cat([torch.eye(4), -torch.eye(4), torch.eye(4), torch.zeros(90, 4)])
        codes, quantized = ops.residual_quantize_on_cuda(3 * torch.eye(4), codebook, 4, "l2")
        assert codes.tolist() == [[i, i, i, 12] for i in range(4)]
        assert torch.equal(quantized, 3 * torch.eye(4))

    def test_squares_that_fp16_cannot_hold(self):
        generator = torch.Generator().manual_seed(0)
        z, codebook = (((torch.rand(n, 16, generator=generator) * 2 - 1) * s).half() for n, s in ((20, 6e4), (70, 3e4)))
        codes, quantized = ops.residual_quantize_on_cuda(z, codebook, 2, "l2")
        expected_codes, expected = onnx_function("VQResidual", z, codebook, depth=2, metric="l2", shared=True)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(quantized, expected.half())

    def test_vectors_may_lie_anywhere(self):
        z, codebook = lattice("fp32", 20, 40, 8)
        codes, quantized = ops.residual_quantize_on_cuda(z.T.contiguous().T, codebook, 2, "l2")
        for found, expected in zip((codes, quantized), ops.residual_quantize(z, codebook, 2, "l2"), strict=True):
            assert torch.equal(found, expected)
        assert [tuple(part.shape) for part in ops.residual_quantize_on_cuda(z[:0], codebook, 3, "l2")] == [
            (0, 3),
            (0, 8),
        ]


COMPILE = """
import os, sys, json
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
from vqdeploy import kernels
found = {str(cc): kernels.compile_nearest(("fp32", "fp16"), 64, "l2", 16, cc) for cc in (80, 86, 89, 90, 120)}
found["cosine"] = kernels.compile_nearest(("bf16", "bf16"), 4, "cosine", 64)
found["residual"] = kernels.compile_residual(("fp16", "fp16"), 512, 2, "l2", True, 64)
found["residual fp32"] = kernels.compile_residual(("fp32", "fp32"), 64, 4, "l2", True, 64)
found["residual own"] = kernels.compile_residual(("fp16", "fp32"), 128, 8, "dot", False, 16)
print(json.dumps({name: ptx._asdict() for name, ptx in found.items()}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """PTX by name, made in a process of its own: here the kernels are interpreted."""
    arguments = [sys.executable, "-c", COMPILE, tmp_path_factory.mktemp("triton")]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603
    assert process.returncode == 0, process.stderr
    return {name: kernels.Ptx(**ptx) for name, ptx in json.loads(process.stdout).items()}


NAMES = {"80": "sm_80", "86": "sm_86", "89": "sm_89", "90": "sm_90a", "120": "sm_120a"}
NAMES |= dict.fromkeys(["cosine", "residual", "residual fp32", "residual own"], "sm_80")


@pytest.mark.parametrize("name", NAMES)
def test_ptx_is_assembled(compiled, name, tmp_path):
    ptx, target = compiled[name], NAMES[name]
    (tmp_path / "kernel.ptx").write_text(ptx.text)
    assembler = "ptxas-blackwell" if name == "120" else "ptxas"
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / assembler
    command = [program, f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", NAMES)
def test_ptx_suits_the_gpu_and_old_drivers(compiled, name):
    ptx = compiled[name]
    assert re.search(r"\.target (\w+)", ptx.text)[1] == NAMES[name]
    assert re.search(r"\.version (\S+)", ptx.text)[1] == ("8.7" if name == "120" else "8.0")
    assert ptx.shared <= 48 * 1024
    assert f".reqntid {ptx.threads}" in ptx.text
    assert "fma.rn.f32" in ptx.text
    assert "tf32" not in ptx.text


@pytest.mark.parametrize("name", NAMES)
def test_ptx_takes_the_arguments_of_the_node_and_no_more(compiled, name):
    ptx = compiled[name]
    kind = "residual" if "residual" in name else "nearest"
    (parameters,) = re.findall(rf"\.visible \.entry vq_{kind}\(([^)]*)\)", ptx.text)
    types = re.findall(r"\.param \.(\w+)", parameters)
    assert types == ["u64", "u64", "u32", "u32", "u64"] + (["u64"] if kind == "residual" else [])
    assert ptx.name == f"vq_{kind}"


def test_ptx_tells_nothing_of_the_machine(compiled):
    assert not [name for name, ptx in compiled.items() if ".py" in ptx.text]


def test_scratch_memory_that_a_kernel_uses_is_not_taken_from_it():
    head = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{"
    assert (
        kernels._without_scratch(head + "\n\tret;\n}", 1)
        == ".visible .entry f(\n\t.param .u64 f_param_0\n)\n{\n\tret;\n}"
    )
    with pytest.raises(ValueError, match="f uses f_param_1"):
        kernels._without_scratch(head + "\n\tld.param.b64 %rd1, [f_param_1];\n}", 1)


ON_A_GPU = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import torch
from vqdeploy.models import ops
generator = torch.Generator().manual_seed(0)
for kind in (torch.float32, torch.float16, torch.bfloat16):
    for count, size, dim in ((1, 1, 4), (100, 1000, 33), (5000, 4096, 256), (10, 65536, 512)):
        z = (torch.randint(-8, 9, (count, dim), generator=generator) / 4).to(kind)
        codebook = (torch.randint(-2, 3, (size, dim), generator=generator) / 2).to(kind)
        expected = ops.residual_quantize(z, codebook, 4, "l2")
        found = ops.residual_quantize(z.cuda(), codebook.cuda(), 4, "l2")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)), (kind, count, size, dim)
        assert torch.equal(ops.nearest(z.cuda(), codebook.cuda(), "l2").cpu(), ops.nearest(z, codebook, "l2"))
        ops.nearest(z.cuda(), codebook.cuda(), "cosine")
print("equal")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_operators_agree_on_a_gpu(python):
    assert python(ON_A_GPU) == "equal\n"
