"""What a sampler expects of the stages of a plan: names, types and shapes of what it writes, reads and carries on."""

from collections.abc import Iterator, Mapping

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.manifest import Manifest, StageInfo, TensorInfo

Shape = tuple[int | str, ...]
Expected = tuple[str, Shape] | str
"""A type and a shape, whose names are open dimensions, or sizes that are the same wherever the name stands; or the name
of a type and shape that are the same wherever it stands."""

Tensors = Mapping[str, Expected]
"""What is expected of inputs or outputs, by name."""

_ROWS = ("batch", "images")  # with guidance, the rows of a call are more than its images
_OPEN = (*_ROWS, "length", "conditions", "past", "total")
_CARRIED, _TAKEN = "present_", "past_"
_GROWN = {"total": "past"}  # a state that grows from call to call


def whole(*shape: int | str, rows: str = "batch") -> Expected:
    """Integers int64 [rows, *shape]."""
    return "int64", (rows, *shape)


def floats(*shape: int | str, rows: str = "batch") -> Expected:
    """Floats float32 [rows, *shape], which a request gives and no precision changes."""
    return "float32", (rows, *shape)


def sampling_options(*shape: int | str, rows: str = "batch") -> dict[str, Expected]:
    """Temperature, top-k and top-p [rows, *shape]."""
    return {name: of(*shape, rows=rows) for name, of in (("temperature", floats), ("top_k", whole), ("top_p", floats))}


def check(manifest: Manifest, inputs: Mapping[str, Tensors], outputs: Mapping[str, Tensors]) -> None:
    """Compares the stages of a plan with what is expected of each.

    Raises:
        ArtifactError: A stage or tensor is missing, or of another type or shape.
    """
    known: dict[str, object] = {}
    for name, expected in inputs.items():
        stage = manifest.stage(name)
        for side, infos, wanted in (("input", stage.inputs, expected), ("output", stage.outputs, outputs[name])):
            found = {info.name: info for info in infos}
            for tensor, spec in wanted.items():
                if tensor not in found or not _fits(spec, found[tensor], known):
                    _refuse(name, f"an {side} {_text(tensor, spec)}", found.get(tensor))
            for info in infos:  # what the sampler does not know holds a row for each image all the same
                if info.name not in wanted and not _fits(f"{name} {info.name}", info, known):
                    _refuse(name, f"an {side} {info.name} [batch, ...] of known size", info)
        for tensor in outputs[name]:
            if tensor in stage.aliases:
                shared = next(info for info in stage.inputs if info.name == stage.aliases[tensor])
                _refuse(name, f"a buffer of its own for {tensor}", shared)
        for one, other in _carried(stage):
            later = tuple(_GROWN.get(str(size), size) for size in one.shape)
            if other is None or (one.dtype, later) != (other.dtype, other.shape):
                _refuse(name, f"an input for {one.name} as {_text(one.name, (one.dtype, one.shape))}", other)


def _fits(expected: Expected, info: TensorInfo, known: dict[str, object]) -> bool:
    if isinstance(expected, str):
        rows, *others = info.shape or (None,)
        held = rows in _ROWS and all(isinstance(size, int) or size in _OPEN for size in others)
        return held and known.setdefault(expected, (info.dtype, info.shape)) == (info.dtype, info.shape)
    dtype, shape = expected
    return (info.dtype, len(info.shape)) == (dtype, len(shape)) and all(
        found == size
        if isinstance(size, int) or size in _OPEN
        else isinstance(found, int) and known.setdefault(size, found) == found
        for size, found in zip(shape, info.shape, strict=True)
    )


def _carried(stage: StageInfo) -> Iterator[tuple[TensorInfo, TensorInfo | None]]:
    """Each output that the next call takes, and the input that takes it."""
    inputs = {info.name: info for info in stage.inputs}
    for info in stage.outputs:
        if info.name.startswith(_CARRIED):
            yield info, inputs.get(_TAKEN + info.name.removeprefix(_CARRIED))


def _text(name: str, expected: Expected) -> str:
    if isinstance(expected, str):
        return f"{name} as elsewhere"
    return f"{name} {expected[0]} [{', '.join(map(str, expected[1]))}]"


def _refuse(stage: str, expected: str, found: TensorInfo | None) -> None:
    shown = "none" if found is None else _text(found.name, (found.dtype, found.shape))
    raise ArtifactError(f"stage {stage} does not fit its sampler", expected=expected, found=shown)
