"""One graph of a system, before export."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from vqdeploy.export.functions import OPSET, attach, translations


class Dimension(StrEnum):
    """Names of the dimensions that stay open."""

    BATCH = "batch"
    LENGTH = "length"
    CONDITIONS = "conditions"


@dataclass
class Stage:
    """A module with example inputs (batch first, batch size 2) and the names of its outputs.

    A list of tensors is spread over inputs `NAME.0`, `NAME.1` and so on. `dynamic` names open dimensions other than
    the batch, `aliases` the output that a backend may write over an input.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor | list[Tensor]]
    outputs: list[str]
    dynamic: dict[str, dict[int, Dimension]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs, lists spread."""
        spread = (
            [name] if isinstance(x, Tensor) else [f"{name}.{i}" for i in range(len(x))]
            for name, x in self.inputs.items()
        )
        return [name for names in spread for name in names]

    def to_onnx(self, opset: int = OPSET) -> onnx_ir.Model:
        """Exports the module."""
        dims = {name: torch.export.Dim(name, min=1, max=4096) for name in Dimension}

        def shape(name: str) -> dict[int, torch.export.Dim]:
            return {0: dims[Dimension.BATCH]} | {axis: dims[d] for axis, d in self.dynamic.get(name, {}).items()}

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
        attach(program.model)
        return program.model
