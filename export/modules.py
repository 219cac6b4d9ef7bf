"""Any PyTorch module as an ONNX package: `export_module`.

The stages run on a copy of the module with replaced quantizers (`vqdeploy.export.quantizers`). Inputs and outputs of a
stage are float32, int64 or uint8, whatever types the module uses inside.
"""

import ast
import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.export import stage as graphs
from vqdeploy.export.functions import OPSET, attach, translations
from vqdeploy.export.package import write_package
from vqdeploy.export.precision import DTYPES, in_precision
from vqdeploy.export.quantizers import copied, look_alikes, replace_quantizers
from vqdeploy.export.stage import Dimension
from vqdeploy.files import real, replacing_folder
from vqdeploy.runtime.manifest import FILE, FORMAT, NAME, WEIGHTS, Manifest, Provenance
from vqdeploy.runtime.operators import OPERATORS

log = logging.getLogger("vqdeploy")

Axes = Mapping[str, Mapping[int, str]]
"""Input or output -> axis -> name of its dynamic dimension."""


@dataclass(frozen=True)
class Stage:
    """One function of a module that becomes a graph.

    Attributes:
        function: Takes the module and the inputs, in order, and returns a tensor or several. It must call the module
            that it is given.
        inputs: Example tensors by name, which give dtypes, static dimensions, usual sizes and realistic values.
        outputs: Names of the returned tensors, in order.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]


def export_module(
    model: nn.Module,
    stages: Mapping[str, Stage],
    folder: str | Path,
    dynamic: Axes | None = None,
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
    dtype: str = "fp32",
    verify: bool = True,
    progress: Callable[[str], object] = log.info,
) -> Manifest:
    """Atomically writes the ONNX package of a module, which is not modified.

    Args:
        model: The module. It is exported in evaluation mode.
        stages: What to export, by name.
        folder: Output folder. An existing package is replaced.
        dynamic: Dynamic dimensions of inputs, by axis; an output of that name has them too.
        sizes: Smallest, usual and largest size of dynamic dimensions. By default the batch follows `build`, and every
            other dimension ranges from the smallest size that the module accepts to at most four times the example's.
        dtype: Precision of the weights, `fp32` or `fp16`; quantizers stay in fp32.
        verify: Compare each stage with the original module, at several sizes; see `vqdeploy.verify.modules`.
        progress: Called with the name of each stage before its export.

    Returns:
        The manifest of the package.

    Raises:
        VqdeployError: A name is duplicate or unknown, a quantizer is not supported, or a stage cannot be exported; the
            message names the part of the module.
        ArtifactError: The graphs do not match the module.
    """
    folder = Path(folder)
    _check_arguments(model, stages, dynamic or {}, sizes or {}, dtype)
    for sentence in look_alikes(model):
        log.warning("%s", sentence)
    _check_finite(model)
    digest = weights_digest(copied(model))
    parts = [in_precision(part, dtype) for part in _parts(model, stages, dynamic or {}, sizes or {})]
    described = Manifest(
        format=FORMAT,
        name=re.sub(r"[^A-Za-z0-9_-]", "-", real(folder).name).lstrip("-") or "module",
        precision=dtype,
        opset=OPSET,
        provenance=Provenance(producer=f"vqdeploy {version('vqdeploy')}", checkpoint=digest),
        stages=(),
        members={},
    )
    with replacing_folder(folder, (FILE, WEIGHTS, "*.onnx")) as new:
        package = new / "package"
        manifest = write_package(parts, package, described, progress)
        if verify:
            from vqdeploy.verify import table
            from vqdeploy.verify.modules import verify_package  # which imports this module

            report = verify_package(package, model, stages, progress)
            if not report["passed"]:
                for line in table(report).splitlines():
                    log.warning("%s", line)
                worst = next(check for check in report["checks"] if not check["passed"])
                raise ArtifactError(
                    f"stage {worst['stage']} does not match the module: {worst['metric']}",
                    expected=f"{worst['limit']:.3g} or less",
                    found=f"{worst['value']:.3g}",
                )
        for file in list(package.iterdir()):
            file.rename(new / file.name)
        package.rmdir()
    return manifest


def weights_digest(model: nn.Module) -> str:
    """Sha256 of the names and values of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def quantizer_stages(quantizer: nn.Module, vectors: Tensor) -> dict[str, Stage]:
    """The stages of a quantizer alone, for a model whose other layers cannot or need not be exported.

    Args:
        quantizer: A quantizer of a registered class.
        vectors: Example input.

    Returns:
        `encode` from `vectors` to `codes`, and `decode` back if the quantizer supports it.
    """
    with torch.no_grad():
        found = copied(quantizer)(vectors)
    if isinstance(found, Tensor):  # codes alone
        return {"encode": Stage(lambda q, x: q(x), {"vectors": vectors}, ["codes"])}
    back = "get_output_from_indices" if hasattr(quantizer, "get_output_from_indices") else "indices_to_codes"
    return {
        "encode": Stage(lambda q, x: q(x)[1], {"vectors": vectors}, ["codes"]),
        "decode": Stage(lambda q, codes: getattr(q, back)(codes), {"codes": found[1]}, ["vectors"]),
    }


class Call(nn.Module):
    """A stage as a module: `forward` takes the inputs and returns all outputs as float32, int64 or uint8.

    The function gets floats in fp32, which the copies of the module are in, and other inputs in the example's type.

    Raises:
        VqdeployError: At a call: the function returns other than the outputs of the stage, or complex numbers.
    """

    def __init__(self, name: str, model: nn.Module, stage: Stage):
        super().__init__()
        self.name, self.model, self.function = name, model, stage.function
        examples = stage.inputs.values()
        self.types = [torch.float32 if x.is_floating_point() else x.dtype for x in examples]
        self.outputs = list(stage.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Copies, since a stage may work in place.
        given = [x.to(dtype, copy=True) for x, dtype in zip(inputs, self.types, strict=True)]
        result = self.function(self.model, *given)
        found = tuple(result) if isinstance(result, tuple | list) else (result,)
        if len(found) != len(self.outputs) or not all(isinstance(tensor, Tensor) for tensor in found):
            names = [type(each).__name__ for each in found]
            raise VqdeployError(
                f"stage {self.name} returns other outputs than it names", expected=self.outputs, found=names
            )
        return tuple(map(at_border, found))


def at_border(x: Tensor) -> Tensor:
    """A tensor in its type outside of a graph: float32, int64 or uint8.

    Raises:
        VqdeployError: Its numbers are complex.
    """
    if x.is_complex():
        raise VqdeployError("plans cannot hold complex numbers", fix="return torch.view_as_real of them")
    if x.is_floating_point():
        return x.float()
    return x if x.dtype == torch.uint8 else x.to(torch.uint8 if x.dtype == torch.bool else torch.int64)


@dataclass
class _Part(graphs.Stage):
    """One stage of a module, with its dynamic dimensions by input and output."""

    axes: Axes = field(default_factory=dict)
    dims: tuple[Dimension, ...] = ()

    @property
    def dimensions(self) -> set[Dimension]:
        """All dynamic dimensions."""
        return set(self.dims)

    def to_onnx(self, opset: int = OPSET) -> onnx_ir.Model:
        """Exports the module."""
        with _quiet():
            try:
                model = self._exported(opset)
            except Exception as error:  # exceptions of the exporter have no common base class
                raise _refusal(error, self) from error
        _check_operators(model, self.name)
        attach(model)
        _free_names(model, self.name)
        _bound_divisors(model)
        _name_dimensions(model, self.axes)
        return model

    def _exported(self, opset: int) -> onnx_ir.Model:
        shapes = tuple(dict.fromkeys(self.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in self.inputs)
        inputs = tuple(self.inputs.values())
        program = torch.onnx.export(
            torch.export.export(self.module, inputs, dynamic_shapes=(shapes,), strict=False),
            (),
            dynamo=True,
            input_names=list(self.inputs),
            output_names=self.outputs,
            opset_version=opset,
            custom_translation_table=translations(),
            verbose=False,
        )
        if program is None:
            raise RuntimeError("PyTorch exported nothing")
        return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Redirects what PyTorch prints on failure, whole graphs, to the log."""
    logger, printed = logging.getLogger("torch.fx"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        logger.setLevel(level)
        if printed.getvalue():
            log.debug("PyTorch: %s", printed.getvalue())


_SCOPES, _TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"  # what PyTorch's exporter leaves


def _check_operators(model: onnx_ir.Model, stage: str) -> None:
    """Refuses operators that plans do not have, by the part of the module that needs them."""
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and node.op_type not in OPERATORS[""]:
            *scopes, _ = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
            name = scopes[-1].removeprefix("model").lstrip(".") if scopes else ""
            lines = re.findall(r'File "([^"]+)", line (\d+)', node.metadata_props.get(_TRACE, ""))
            own = [f" ({file}, line {line})" for file, line in lines if not file.startswith((_TORCH, __file__))]
            part = f"{name or 'the module itself'}{own[-1] if own else ''}"
            random = "Random" in node.op_type or node.op_type in ("Bernoulli", "Multinomial")
            fix = "take random numbers as an input" if random else "quantizer_stages exports a quantizer alone"
            raise VqdeployError(f"stage {stage} cannot be exported in {part}: plans have no {node.op_type}", fix=fix)


def _free_names(model: onnx_ir.Model, stage: str) -> None:
    """Renames values that collide with the name of an input or output.

    Constants that are not parameters get names that are unique among all stages, since stages share their weights.
    """
    graph = model.graph
    border = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants = list(graph.initializers.values())
    for value in itertools.chain(*(node.outputs for node in graph)):
        if value.name in taken and id(value) not in border:
            value.name = f"{value.name}.inner"
    for value in constants:
        if "." not in str(value.name):
            value.name = f"{stage}.{value.name}"


_WHOLE = {onnx_ir.DataType.INT64, onnx_ir.DataType.INT32}


def _bound_divisors(model: onnx_ir.Model) -> None:
    """Clamps integer divisors to 1 or more: plans must not divide by 0, and PyTorch's shape arithmetic divides."""
    graph = model.graph
    for node in [node for node in graph if node.op_type in ("Div", "Mod") and node.domain in ("", "ai.onnx")]:
        divisor = node.inputs[1]
        if divisor is None or divisor.dtype not in _WHOLE or divisor.const_value is not None:
            continue
        one = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(1, dtype=divisor.dtype)})
        bound = onnx_ir.node("Max", [divisor, one.outputs[0]])
        for part in (one, bound):
            part.outputs[0].name = f"{node.outputs[0].name}.{part.op_type}"
            part.outputs[0].type = divisor.type
        bound.outputs[0].shape = divisor.shape
        graph.insert_before(node, [one, bound])
        node.replace_input_with(1, bound.outputs[0])


def _name_dimensions(model: onnx_ir.Model, axes: Axes) -> None:
    """Replaces PyTorch's symbols of dynamic dimensions by our names, in the whole graph."""
    graph = model.graph
    names: dict[str, str] = {}
    for value in graph.inputs:
        names |= {str(_dim(value, axis)): name for axis, name in axes.get(str(value.name), {}).items()}
    values = itertools.chain(*(node.outputs for node in graph))
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(_dim(value, i)), d) for i, d in enumerate(value.shape)])
    for value in (*graph.inputs, *graph.outputs):
        own = axes.get(str(value.name), {})
        value.shape = onnx_ir.Shape([own.get(i, d) for i, d in enumerate(value.shape or ())])


def _dim(value: onnx_ir.Value, axis: int) -> int | str | None:
    if value.shape is None:
        raise ValueError(f"{value} has no shape")
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else dim.value


def _check_finite(model: nn.Module) -> None:
    """Refuses NaN, and infinities in parameters; a buffer may be a mask."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if bool(tensor.isnan().any() if kind == "buffer" else not tensor.isfinite().all()):
                expected = "finite numbers" if kind == "parameter" else "no NaN"
                raise VqdeployError(f"the {kind} {name} is not finite", expected=expected)


def _check_arguments(
    model: nn.Module, stages: Mapping[str, Stage], dynamic: Axes, sizes: Mapping[str, Sequence[int]], dtype: str
) -> None:
    _check_type("the model", model, nn.Module, "a torch.nn.Module")
    _check_type("stages", stages, Mapping, "a dictionary of Stages by name")
    _check_type("dynamic", dynamic, Mapping, "a dictionary of axes by tensor")
    _check_type("sizes", sizes, Mapping, "a dictionary of sizes by dimension")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise VqdeployError("unsupported precision", expected=" or ".join(DTYPES), found=repr(dtype))
    if not stages:
        raise VqdeployError("there is no stage to export")
    for name, stage in stages.items():
        _check_stage(name, stage)
    known = {tensor for stage in stages.values() for tensor in (*stage.inputs, *stage.outputs)}
    if unknown := [name for name in dynamic if name not in known]:
        raise VqdeployError("dynamic names a tensor that no stage has", expected=sorted(known), found=unknown[0])
    for tensor, axes in dynamic.items():
        _check_type(f"dynamic of {tensor}", axes, Mapping, "a dictionary of names by axis")
        if bad := [axis for axis in axes if not isinstance(axis, Integral)]:
            raise VqdeployError(f"dynamic of {tensor} has an invalid axis", expected="integers", found=repr(bad[0]))
        _check_names(axes.values())
    dims = {dim for axes in dynamic.values() for dim in axes.values()}
    if unknown := [name for name in sizes if name not in dims]:
        raise VqdeployError("sizes names a dimension that is not dynamic", expected=sorted(dims), found=unknown[0])
    for name, own in sizes.items():
        three = isinstance(own, tuple | list) and len(own) == 3 and all(isinstance(size, Integral) for size in own)
        if not three or not 1 <= own[0] <= own[1] <= own[2]:
            expected = "three ascending integers of 1 or more: smallest, usual, largest"
            raise VqdeployError(f"the sizes of {name} are malformed", expected=expected, found=repr(own))


def _check_stage(name: str, stage: Stage) -> None:
    _check_names([name])
    _check_type(f"stage {name}", stage, Stage, "a vqdeploy.export.Stage")
    if not callable(stage.function):
        raise VqdeployError(f"the function of stage {name} cannot be called")
    _check_type(f"inputs of stage {name}", stage.inputs, Mapping, "a dictionary of tensors by name")
    _check_type(f"outputs of stage {name}", stage.outputs, tuple | list, "a list of names")
    tensors = [*stage.inputs, *stage.outputs]
    _check_names(tensors)
    if not stage.inputs or not stage.outputs:
        raise VqdeployError(f"stage {name} has no {'outputs' if stage.inputs else 'inputs'}")
    if len(set(tensors)) < len(tensors):
        raise VqdeployError(f"two tensors of stage {name} have one name", found=", ".join(tensors))
    for key, example in stage.inputs.items():
        _check_type(f"the example {key} of stage {name}", example, Tensor, "a tensor")
        if example.is_complex() or not example.numel() or example.isnan().any():
            found = "complex numbers" if example.is_complex() else "NaN" if example.numel() else "none"
            raise VqdeployError(
                f"the example {key} of stage {name} cannot be used", expected="real numbers", found=found
            )


def _check_type(what: str, value: object, kind: type | UnionType, expected: str) -> None:
    if not isinstance(value, kind):
        raise VqdeployError(f"{what} cannot be of this type", expected=expected, found=type(value).__name__)


def _check_names(names: Iterable[object]) -> None:
    if bad := [name for name in names if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise VqdeployError("a name is invalid", expected="letters, digits, - and _", found=repr(bad[0]))


def _parts(model: nn.Module, stages: Mapping[str, Stage], dynamic: Axes, sizes: Mapping[str, Any]) -> list[_Part]:
    reference, (served, _) = copied(model), replace_quantizers(model)
    return [_part(name, stage, reference, served, dynamic, sizes) for name, stage in stages.items()]


def _part(
    name: str, stage: Stage, reference: nn.Module, served: nn.Module, dynamic: Axes, sizes: Mapping[str, Any]
) -> _Part:
    """A stage before its export, and the sizes of its dynamic dimensions, which are tried on the original module."""
    call = Call(name, reference, stage)
    axes = {tensor: dict(dynamic[tensor]) for tensor in stage.inputs if tensor in dynamic}
    usual = example_sizes(name, stage.inputs, axes)

    def shapes(**changed: int) -> list[tuple[int, ...]]:
        with torch.no_grad():
            return [tuple(x.shape) for x in call(*resized(stage.inputs, axes, usual | changed).values())]

    try:
        shapes()
    except VqdeployError:
        raise
    except Exception as error:  # modules raise anything
        fix = _CASTS if re.search("Half|BFloat16|Double", str(error)) else None
        raise VqdeployError(
            f"stage {name} fails in PyTorch: {_first_line(error)}{_place(error, call)}", fix=fix
        ) from error
    dims = _open_dimensions(usual, sizes, lambda **changed: _accepts(shapes, **changed))
    axes = {tensor: {i: d for i, d in own.items() if d in dims} for tensor, own in axes.items()}
    outputs, derived = _output_dimensions(stage, dims, shapes, dynamic)
    traced = {dim: max(usual[dim], 2) for dim in dims}  # PyTorch specializes dimensions of size 1
    return _Part(
        name,
        Call(name, served, stage),
        {tensor: at_border(x) for tensor, x in resized(stage.inputs, axes, traced).items()},
        list(stage.outputs),
        axes=axes | outputs,
        dims=(*dims.values(), *derived.values()),
    )


_CASTS = "let what casts take the type of the weights, since the module is exported from a copy in fp32"


def example_sizes(name: str, inputs: Mapping[str, Tensor], axes: Axes) -> dict[str, int]:
    """The size of each dynamic dimension in the examples.

    Raises:
        VqdeployError: Two examples disagree on a size, or an example lacks the axis.
    """
    sizes: dict[str, int] = {}
    for tensor, own in axes.items():
        for axis, dim in own.items():
            if not 0 <= axis < inputs[tensor].ndim:
                found = f"axis {axis} of {list(inputs[tensor].shape)}"
                raise VqdeployError(f"the example {tensor} of stage {name} lacks the axis {dim}", found=found)
            if sizes.setdefault(dim, size := inputs[tensor].shape[axis]) != size:
                raise VqdeployError(f"the examples of stage {name} differ in {dim}", expected=sizes[dim], found=size)
    return sizes


def resized(
    inputs: Mapping[str, Tensor], axes: Axes, sizes: Mapping[str, int], noise: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Examples repeated or cropped to other sizes; with `noise`, no two slices along dynamic dimensions are equal.

    Args:
        inputs: Example tensors.
        axes: Their dynamic dimensions.
        sizes: New size of each dynamic dimension.
        noise: Random generator. Floats get noise of half their standard deviation; integers are drawn from the example,
            as whole slices along its dynamic dimensions.
    """
    result = {}
    for name, example in inputs.items():
        x, own = example.detach().cpu(), axes.get(name, {})
        if noise is not None and own and not x.is_floating_point():
            shape = [sizes[own[axis]] if axis in own else size for axis, size in enumerate(x.shape)]
            result[name] = _drawn(x, sorted(own), shape, noise)
            continue
        for axis, dim in own.items():
            x = x.index_select(axis, torch.arange(sizes[dim]) % example.shape[axis])
        if noise is not None and x.is_floating_point():
            finite = x[x.isfinite()].float()  # a mask has infinities
            spread = float(finite.std()) if finite.numel() > 1 else 0.0
            x = x + 0.5 * (spread or 1.0) * torch.randn(x.shape, generator=noise).to(x.dtype)
        result[name] = x
    return result


def _drawn(example: Tensor, axes: list[int], shape: list[int], noise: torch.Generator) -> Tensor:
    """Random slices of an example, one for each index along the axes of the new shape."""
    front = list(range(len(axes)))
    slices = example.movedim(axes, front).flatten(0, len(axes) - 1)
    sizes = [shape[axis] for axis in axes]
    places = torch.randint(len(slices), sizes, generator=noise)
    return slices[places].movedim(front, axes)


def _accepts(shapes: Callable[..., list[tuple[int, ...]]], **changed: int) -> bool:
    """Whether the module accepts these sizes and returns nonempty tensors."""
    try:
        return all(0 not in shape for shape in shapes(**changed))
    except Exception:  # modules raise anything
        return False


def _open_dimensions(
    usual: Mapping[str, int], sizes: Mapping[str, Any], accepts: Callable[..., bool]
) -> dict[str, Dimension]:
    """The dimensions whose range has more than one size."""
    dims = {}
    for name, size in usual.items():
        if name in sizes:
            smallest, middle, largest = map(int, sizes[name])
        elif name == BATCH:
            smallest, middle, largest = 1, size, max(size, _LARGEST_BATCH)
        else:
            smallest, middle, largest = _smallest(name, size, accepts), size, _largest(name, size, accepts)
        if smallest < largest:
            dims[name] = Dimension(name, largest, middle, smallest)
    alone = {name for name in dims if name not in sizes and name != BATCH}
    if not accepts(**{name: dim.smallest for name, dim in dims.items() if name != BATCH}):
        dims |= {name: dataclasses.replace(dims[name], smallest=usual[name]) for name in alone}
    if not accepts(**{name: dim.largest for name, dim in dims.items() if name != BATCH}):
        dims |= {name: dataclasses.replace(dims[name], largest=usual[name]) for name in alone}
    return {name: dim for name, dim in dims.items() if dim.smallest < dim.largest}


BATCH = "batch"
_LARGEST_BATCH = 4096  # default; `build --max-batch` sets the actual one


def _smallest(name: str, size: int, accepts: Callable[..., bool]) -> int:
    if accepts(**{name: 1}):
        return 1
    while size % 2 == 0 and accepts(**{name: size // 2}):
        size //= 2
    return size


def _largest(name: str, size: int, accepts: Callable[..., bool]) -> int:
    for _ in range(2):
        if accepts(**{name: 2 * size}):
            size *= 2
    return size


def _output_dimensions(
    stage: Stage, dims: Mapping[str, Dimension], shapes: Callable[..., list[tuple[int, ...]]], dynamic: Axes
) -> tuple[dict[str, dict[int, str]], dict[str, Dimension]]:
    """Names of the dynamic dimensions of outputs, and sizes of those that no input has."""
    usual = {name: dim.usual for name, dim in dims.items()}
    other = {name: dim.largest if dim.largest > dim.usual else dim.smallest for name, dim in dims.items()}
    if BATCH in other:
        other[BATCH] = usual[BATCH] + 1
    runs = [usual, *({**usual, name: size} for name, size in other.items())]
    found = [shapes(**sizes) for sizes in runs]
    ends = [shapes(**{n: getattr(d, k) if n != BATCH else usual[n] for n, d in dims.items()}) for k in _KINDS]
    names: dict[str, dict[int, str]] = {}
    derived: dict[str, Dimension] = {}
    for o, output in enumerate(stage.outputs):
        names[output] = {}
        for axis in range(len(found[0][o])):
            seen = [shape[o][axis] for shape in found]
            if len(set(seen)) == 1:
                continue
            same = [name for name in dims if [sizes[name] for sizes in runs] == seen]
            name = same[0] if same else dynamic.get(output, {}).get(axis, f"{output}_{axis}")
            if not same and name in dims:
                name = f"{output}_{axis}"
            names[output][axis] = name
            if not same:
                smallest, middle, largest = (shape[o][axis] for shape in ends)
                if BATCH in dims and seen[1 + list(dims).index(BATCH)] != seen[0]:
                    smallest, largest = 1, middle * dims[BATCH].largest
                derived[name] = Dimension(name, largest, middle, smallest)
    return names, derived


_KINDS = ("smallest", "usual", "largest")


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"\s*\((unhinted|Size-like).*", "", str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


_HELP = (
    ("data-dependent", "the module branches on the value of a tensor: use torch.where, or decide before the export"),
    ("Constraints violated", "take the dimension from dynamic, or the number that fixes it from the code"),
    ("specialized", "take the dimension from dynamic, or the number that fixes it from the code"),
    ("torchscript", "PyTorch's exporter has no ONNX operator for it"),
)
"""Part of a message of PyTorch -> advice."""


def _refusal(error: Exception, part: _Part) -> VqdeployError:
    """The error for a stage that cannot be exported: part of the module, line, reason and advice."""
    if isinstance(error, VqdeployError):
        return error
    message = " ".join(map(str, _chain(error)))
    advice = [text for sign, text in _HELP if sign.lower() in message.lower()][:1]
    advice += look_alikes(part.module)[:1]
    reason = _first_line(list(_chain(error))[-1])
    if closed := re.search(r"L\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\]", message):
        tensor, axis = list(part.inputs)[int(closed[1])], int(closed[2])
        reason = f"{part.axes[tensor].get(axis, axis)} of {tensor} has one size only"
        if any(isinstance(layer, nn.RNNBase) for layer in part.module.modules()):
            advice.append("recurrent layers take the length of the example, and no other")
    return VqdeployError(
        f"stage {part.name} cannot be exported{_place(error, part.module)}: {reason}",
        fix="; ".join([*advice, "quantizer_stages exports a quantizer alone"]),
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _place(error: BaseException, module: nn.Module) -> str:
    """The innermost submodule in the traceback of an error, and its line; empty if there is none."""
    names = {id(part): name for name, part in module.named_modules()}
    place = ""
    for link in _chain(error):
        for frame, line in traceback.walk_tb(link.__traceback__):
            name = names.get(id(frame.f_locals.get("self")))
            file = frame.f_code.co_filename
            if name is None or file == __file__ or file.startswith(_TORCH):
                continue
            name = name.removeprefix("model").lstrip(".")
            place = f" in {name or 'the module itself'} ({file}, line {line})"
        if place:
            break
    return place


_TORCH = str(Path(torch.__file__).parent)
