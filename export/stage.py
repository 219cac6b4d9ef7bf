"""One graph of a system, before export."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from vqdeploy.export.functions import OPSET, attach, translations


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension: name, and largest, usual and smallest size."""

    name: str
    largest: int
    usual: int = 1
    smallest: int = 1


_LARGEST = 4096  # upper bound for the exporter; a tighter one could end up in the graph

BATCH = Dimension("batch", _LARGEST)
"""The first dimension of inputs and outputs of the stages of a system."""

IMAGES = Dimension("images", _LARGEST)
"""The first dimension of what an image has once, where images with guidance have two rows of the batch."""


@dataclass
class Stage:
    """A module with example inputs (batch first, batch size 2) and the names of its outputs.

    A list of tensors becomes inputs `NAME.0`, `NAME.1` and so on. `dynamic` has the dynamic dimensions other than the
    batch, which it may replace, and those of outputs that are no dimension of an input. `aliases` has the outputs that
    a backend may write in place of an input. `states` names the inputs that come from earlier calls and so follow the
    precision; inputs of a request, noise too, keep their types. `precision` is one of `vqdeploy.precision.PRECISIONS`.
    `calibration` makes an input to observe activations on, for int8. `in_products` makes the form of the stage that is
    quantized, for one whose convolutions become matrix products then.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor | list[Tensor]]
    outputs: list[str]
    dynamic: dict[str, dict[int, Dimension]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    precision: str = "fp32"
    calibration: Callable[[], Tensor] | None = None
    in_products: "Callable[[], Stage] | None" = None

    @property
    def input_names(self) -> list[str]:
        """Names of the graph inputs, one for each tensor of a list."""
        spread = (
            [name] if isinstance(x, Tensor) else [f"{name}.{i}" for i in range(len(x))]
            for name, x in self.inputs.items()
        )
        return [name for names in spread for name in names]

    @property
    def dimensions(self) -> set[Dimension]:
        """All dynamic dimensions."""
        return {BATCH, *(dimension for axes in self.dynamic.values() for dimension in axes.values())}

    def to_onnx(self, opset: int = OPSET) -> onnx_ir.Model:
        """Exports the module."""
        dims = {d.name: torch.export.Dim(d.name, min=min(d.smallest, 1), max=_LARGEST) for d in self.dimensions}

        def shape(name: str) -> dict[int, Any]:
            return {0: dims[BATCH.name]} | {axis: dims[d.name] for axis, d in self.dynamic.get(name, {}).items()}

        program: Any = torch.onnx.export(
            self.module.eval(),
            tuple(self.inputs.values()),
            dynamo=True,
            input_names=self.input_names,
            output_names=self.outputs,
            dynamic_shapes=tuple(
                shape(name) if isinstance(x, Tensor) else [shape(name)] * len(x) for name, x in self.inputs.items()
            ),
            opset_version=opset,
            custom_translation_table=translations(),
            verbose=False,
        )
        model: onnx_ir.Model = program.model
        for output in model.graph.outputs:  # the exporter calls a dimension by the expression that gives it
            names = {axis: dimension.name for axis, dimension in self.dynamic.get(str(output.name), {}).items()}
            output.shape = onnx_ir.Shape([names.get(axis, size) for axis, size in enumerate(output.shape or ())])
        attach(model)
        return model
