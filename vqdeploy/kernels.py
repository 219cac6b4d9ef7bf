"""Kernels of `VQNearest` and `VQResidual` in Triton: on CUDA tensors, as PTX, and on the CPU in Triton's interpreter.

A program takes a block of vectors and scans the codebook once per depth, tile by tile, like a matrix product of which
only the arg-max of each row is kept. Scores are fp32 for all input types, without TF32; ties go to the lowest index.
Multichannel quantization is `VQNearest` on the split channels.

Importing this module imports Triton, so import it in a function where Triton is optional.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from torch import Tensor
    from triton import JITFunction

WARPS = {16: 4, 64: 8}
"""Vectors per program -> warps. Small blocks give more programs, large ones reuse the codebook tiles."""

_ENTRIES = 64
"""Codebook vectors per tile."""

_STATIC_SHARED_MEMORY = 48 * 1024
"""Limit of static shared memory: TensorRT does not request more from the driver."""

_PTX_VERSIONS = {80: 80, 86: 80, 89: 80, 90: 80, 120: 87}
"""Compute capability -> oldest PTX version that supports it: drivers reject newer PTX."""


@triton.jit
def _vectors(pointer, rows, count, columns, D: tl.constexpr):
    """Loads columns of rows of a matrix as fp32, zero outside."""
    inside = (rows[:, None] < count) & (columns[None, :] < D)
    places = rows[:, None].to(tl.int64) * D + columns[None, :]
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _book(codebook, depth, k, D: tl.constexpr, SHARED: tl.constexpr):
    """Pointer to the codebook of a depth, or to the shared one."""
    return codebook if SHARED else codebook + depth * k.to(tl.int64) * D


@triton.jit
def _search(
    z,
    codebook,
    chosen,
    rows,
    n,
    k,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    SHARED: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Nearest codes of the residuals of vectors after the codes `chosen` at earlier depths."""
    own_book = _book(codebook, len(chosen), k, D, SHARED)
    best = tl.full((rows.shape[0],), float("-inf"), tl.float32)
    codes = tl.zeros((rows.shape[0],), tl.int32)
    for start in range(0, k, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        products = tl.zeros((rows.shape[0], ENTRIES), tl.float32)
        squares = tl.zeros((ENTRIES,), tl.float32)
        for first in range(0, D, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            residual = _vectors(z, rows, n, columns, D)
            for depth in tl.static_range(len(chosen)):
                residual -= _vectors(_book(codebook, depth, k, D, SHARED), chosen[depth], k, columns, D)
            table = _vectors(own_book, entries, k, columns, D)
            products = tl.dot(residual, tl.trans(table), products, input_precision="ieee")
            squares += tl.sum(table * table, 1)
        if METRIC == "l2":
            scores = 2 * products - squares[None, :]
        elif METRIC == "cosine":
            scores = products / tl.maximum(tl.sqrt_rn(squares), 1e-12)[None, :]
        else:
            scores = products
        scores = tl.where(entries[None, :] < k, scores, float("-inf"))
        highest, place = tl.max(scores, 1, return_indices=True)
        codes = tl.where(highest > best, start + place, codes)
        best = tl.maximum(best, highest)
    return codes


@triton.jit
def vq_nearest(
    z,
    codebook,
    n,
    k,
    codes,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes [n] of the vectors z [n, D]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = _search(z, codebook, (), rows, n, k, D, METRIC, True, ENTRIES, COLUMNS)
    tl.store(codes + rows, found.to(tl.int64), mask=rows < n)


@triton.jit
def vq_residual(
    z,
    codebook,
    n,
    k,
    codes,
    quantized,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    METRIC: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes [n, DEPTH] of the vectors z [n, D], and the sums of their vectors [n, D]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen = ()
    for depth in tl.static_range(DEPTH):
        found = _search(z, codebook, chosen, rows, n, k, D, METRIC, SHARED, ENTRIES, COLUMNS)
        tl.store(codes + rows.to(tl.int64) * DEPTH + depth, found.to(tl.int64), mask=rows < n)
        chosen = chosen + (found,)  # type: ignore[assignment]  # noqa: RUF005 (Triton adds tuples, unpacks none)
    for first in range(0, D, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        total = _vectors(codebook, chosen[0], k, columns, D)  # type: ignore[misc]
        for depth in tl.static_range(1, DEPTH):
            total += _vectors(_book(codebook, depth, k, D, SHARED), chosen[depth], k, columns, D)
        inside = (rows[:, None] < n) & (columns[None, :] < D)
        places = rows[:, None].to(tl.int64) * D + columns[None, :]
        tl.store(quantized + places, total.to(quantized.dtype.element_ty), mask=inside)


def _tiles(dim: int, rows: int) -> dict[str, int]:
    return {"D": dim, "ROWS": rows, "ENTRIES": _ENTRIES, "COLUMNS": 32 if dim > 16 else 16}


def nearest(z: "Tensor", codebook: "Tensor", codes: "Tensor", metric: str) -> None:
    """Runs `vq_nearest` on contiguous PyTorch tensors.

    Args:
        z: Vectors [N, D].
        codebook: Codebook [K, D].
        codes: Output, codes [N] int64.
        metric: `l2`, `cosine` or `dot`.
    """
    _launch(vq_nearest, z, codebook, codes, METRIC=metric)


def residual_quantize(z: "Tensor", codebook: "Tensor", codes: "Tensor", quantized: "Tensor", metric: str) -> None:
    """Runs `vq_residual` on contiguous PyTorch tensors.

    Args:
        z: Vectors [N, D].
        codebook: Shared codebook [K, D], or one per depth [Q, K, D].
        codes: Output, codes [N, Q] int64.
        quantized: Output, sums of their vectors [N, D].
        metric: `l2`, `cosine` or `dot`.
    """
    shared = codebook.ndim == 2
    _launch(vq_residual, z, codebook, codes, quantized, DEPTH=codes.shape[1], METRIC=metric, SHARED=shared)


def _launch(kernel: "JITFunction[Any]", z: "Tensor", codebook: "Tensor", *outputs: "Tensor", **constants: Any) -> None:
    (count, dim), size = z.shape, codebook.shape[-2]
    rows = 16 if count < 4096 else 64
    if count:
        kernel[(triton.cdiv(count, rows),)](
            z, codebook, count, size, *outputs, **constants, **_tiles(dim, rows), num_warps=WARPS[rows]
        )


class Ptx(NamedTuple):
    """A compiled kernel. Its arguments are z, codebook, n and k as int32, and the outputs."""

    name: str
    text: str
    threads: int  # of a program
    shared: int  # bytes of a program


def compile_nearest(
    types: tuple[str, str], dim: int, metric: str, rows: int, capability: int = 80, **options: Any
) -> Ptx:
    """PTX of `vq_nearest` for one dimension and metric, and any number of vectors and codes. Needs no GPU.

    Args:
        types: Types of z and of the codebook: `fp32`, `fp16` or `bf16`.
        dim: Dimension of the vectors, D.
        metric: `l2`, `cosine` or `dot`.
        rows: Vectors per program, a key of `WARPS`.
        capability: Compute capability. PTX for 80 runs on later GPUs too, PTX for 90 and 120 on these only.
        **options: Further compiler options of Triton.
    """
    pointers = {"z": types[0], "codebook": types[1], "codes": "i64"}
    return _compile(vq_nearest, pointers, capability, options, METRIC=metric, **_tiles(dim, rows))


def compile_residual(
    types: tuple[str, str],
    dim: int,
    depth: int,
    metric: str,
    shared: bool,
    rows: int,
    capability: int = 80,
    **options: Any,
) -> Ptx:
    """PTX of `vq_residual` for one dimension, depth and metric; otherwise as `compile_nearest`.

    `shared` tells whether all depths share one codebook.
    """
    pointers = {"z": types[0], "codebook": types[1], "codes": "i64", "quantized": types[0]}
    constants = {"DEPTH": depth, "METRIC": metric, "SHARED": shared} | _tiles(dim, rows)
    return _compile(vq_residual, pointers, capability, options, **constants)


def _compile(
    kernel: "JITFunction[Any]",
    pointers: dict[str, str],
    capability: int,
    options: dict[str, Any],
    **constants: Any,
) -> Ptx:
    kinds = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    # TensorRT aligns tensors to 16 bytes, which allows wide loads.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": WARPS[constants["ROWS"]],
        "num_stages": 2,
        "ptx_version": _PTX_VERSIONS[capability],
        "enable_fp_fusion": True,
    } | options
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it contains the working directory
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    if metadata.shared > _STATIC_SHARED_MEMORY and options["num_stages"] > 1:
        return _compile(kernel, pointers, capability, options | {"num_stages": 1}, **constants)
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch or metadata.shared > _STATIC_SHARED_MEMORY:
        raise ValueError(f"{metadata.name} needs {metadata.shared} bytes of shared and {scratch} of scratch memory")
    arguments = sum(kind != "constexpr" for kind in signature.values())
    return Ptx(
        metadata.name, _without_scratch(compiled.asm["ptx"], arguments), 32 * metadata.num_warps, metadata.shared
    )


_ENTRY = re.compile(r"(?<=\.visible \.entry )(?P<name>\w+)\((?P<parameters>[^)]*)\)")


def _without_scratch(text: str, arguments: int) -> str:
    """PTX without the scratch pointers that Triton appends to the parameters, which TensorRT does not pass."""
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("Triton's PTX has no entry")
    parameters = [line.strip() for line in entry["parameters"].split(",")]
    for scratch in parameters[arguments:]:
        symbol = scratch.split()[-1]
        if re.search(rf"\b{symbol}\b", text[entry.end() :]):
            raise ValueError(f"{entry['name']} uses {symbol}, which only Triton's launcher passes")
    kept = ",\n\t".join(parameters[:arguments])
    return f"{text[: entry.start()]}{entry['name']}(\n\t{kept}\n){text[entry.end() :]}"
