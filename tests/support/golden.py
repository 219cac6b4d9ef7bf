"""Recorded outputs of public implementations, and their weights."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"


def read_golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Configuration, inputs and outputs by name, and the full state_dict in the public naming."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    state = {
        key.removeprefix("state_dict/"): tensors.pop(key) for key in list(tensors) if key.startswith("state_dict/")
    }
    for key, shape in json.loads(metadata["seeded"]).items():
        rng = np.random.default_rng(zlib.crc32(key.encode()) + int(metadata["seed"]))
        weight = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            weight /= np.float32(math.sqrt(np.prod(shape[1:])))
        elif key.endswith("bias"):
            weight *= np.float32(0.1)
        else:
            weight = np.float32(1) + np.float32(0.2) * weight
        state[key] = torch.from_numpy(weight)
    return json.loads(metadata["config"]), tensors, state


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def recorded_codes(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The codes of a tokenizer's images; those of several levels in a row, as our tokenizers give them."""
    if "out/codes_top" in tensors:
        return torch.cat([tensors["out/codes_top"].flatten(1), tensors["out/codes_bottom"].flatten(1)], 1)
    return tensors["out/codes"]
