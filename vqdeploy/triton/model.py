"""The model of Triton's Python backend that samples images with a plan.

Only the server has the module `triton_python_backend_utils`. The interface of the class is in the documentation of the
Python backend.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load
from vqdeploy.triton import PLAN


class TritonPythonModel:
    """Samples images: requests are arguments of `Pipeline.generate`, answers its images and codes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the plan in the folder of this version of the model."""
        plan = Path(args["model_repository"]) / args["model_version"] / PLAN
        self.pipeline = load(plan, "cuda" if args["model_instance_kind"] == "GPU" else "cpu")
        self.inputs = [tensor["name"] for tensor in json.loads(args["model_config"])["input"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; errors are those of `Pipeline.generate`."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:  # noqa: ANN401 (of the server, without types)
        found = {name: server.get_input_tensor_by_name(request, name) for name in self.inputs}
        given = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
        try:
            conditions = given.pop(f"{self.pipeline.condition.name}s")
            options = {name: _plain(value) for name, value in given.items()}
            output = self.pipeline.generate(conditions, **options)
        except (VqdeployError, UnicodeDecodeError) as error:
            return server.InferenceResponse(error=server.TritonError(str(error)))
        tensors = {"images": output.images, "codes": output.codes}
        return server.InferenceResponse([server.Tensor(name, array) for name, array in tensors.items()])

    def finalize(self) -> None:
        """Closes the plan."""
        self.pipeline.close()


def _plain(value: np.ndarray) -> Any:  # noqa: ANN401 (an option of any type)
    """The seed or a sampling option: a number, a list of numbers, or text, which arrives as bytes."""
    values = value.tolist()
    text_or_number = values[0] if len(values) == 1 else values
    return text_or_number.decode() if isinstance(text_or_number, bytes) else text_or_number
