"""How long does it take to quantize vectors, and in how much memory? A plan against vector-quantize-pytorch.

python examples/quantizer_speed.py 100000

The vectors have 64 numbers, the quantizer is a ResidualVQ of 8 codebooks of 1,024 vectors. Times are the fastest of
several calls that take turns in one process; memory is what calls add to a process that does nothing else.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from vector_quantize_pytorch import ResidualVQ

from vqdeploy.engines.build import build
from vqdeploy.export import export_module, quantizer_stages
from vqdeploy.machine import peak_memory_mb
from vqdeploy.runtime import load
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.bundle import Bundle

DIM, CODES, DEPTH = 64, 1024, 8
KINDS = ("plan", "eager", "compiled")


def quantizer() -> ResidualVQ:
    """The quantizer, with codebooks of about the size of the vectors."""
    torch.manual_seed(0)
    module = ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=DEPTH).eval().requires_grad_(False)
    for depth, layer in enumerate(module.layers):
        layer._codebook.embed.copy_(torch.randn(1, CODES, DIM) * 0.7**depth)
    return module


def vectors(count: int) -> np.ndarray:
    """Vectors [1, count, DIM]."""
    return np.random.default_rng(0).standard_normal((1, count, DIM), dtype=np.float32)


def caller(kind: str, plan: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    """A call that returns the codes."""
    if kind == "plan":
        pipe = load(plan)
        return lambda: pipe.run("encode", vectors=x)["codes"]
    module: torch.nn.Module = quantizer() if kind == "eager" else torch.compile(quantizer())

    @torch.inference_mode()
    def call() -> np.ndarray:
        codes: np.ndarray = module(torch.from_numpy(x))[1].numpy()
        return codes

    return call


def memory(kind: str, plan: str, count: str) -> None:
    """Prints how many MB the peak of this process grows by in calls, beyond one with 64 vectors."""
    caller(kind, Path(plan), vectors(64))()
    call = caller(kind, Path(plan), vectors(int(count)))
    before = peak_memory_mb()
    call()
    print(peak_memory_mb() - before)


def memory_of(kind: str, plan: Path, count: int) -> float:
    """As `memory`, from a process of its own."""
    command = [sys.executable, __file__, "memory", kind, str(plan), str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def profile(plan: Path, x: np.ndarray, folder: Path) -> dict[str, float]:
    """Share of the time of each operator of the plan."""
    bundle = Bundle(plan)
    session = BACKENDS["onnxrt"]().opener(bundle, "cpu", 0, folder)(bundle.manifest.stage("encode"))
    session.run(vectors=x)
    spent: Counter[str] = Counter()
    for event in session.end_profile():  # type: ignore[attr-defined]
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "Loop":
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: time_ / spent.total() for name, time_ in spent.most_common(8)}


def main(count: str = "100000", repeats: str = "5") -> None:
    """Prints a line for each way, and the profile of the plan."""
    x = vectors(int(count))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = {"encode": quantizer_stages(quantizer(), torch.from_numpy(x[:, :64]))["encode"]}
        sizes = {"count": (1, int(count), max(int(count), 2))}
        export_module(quantizer(), stage, folder / "own-onnx", dynamic={"vectors": {1: "count"}}, sizes=sizes)
        plan = folder / "own.plan"
        build(folder / "own-onnx", plan)
        calls = {kind: caller(kind, plan, x) for kind in KINDS}
        codes = {kind: call() for kind, call in calls.items()}
        best = dict.fromkeys(KINDS, float("inf"))
        for _ in range(int(repeats)):
            for kind, call in calls.items():
                start = time.perf_counter()
                call()
                best[kind] = min(best[kind], time.perf_counter() - start)
        for kind in KINDS:
            grown = memory_of(kind, plan, len(x[0]))
            differ, times = (codes[kind] != codes["eager"]).mean(), best[kind] / best["plan"]
            print(f"{kind:9} {best[kind]:7.3f} s  {times:5.2f} times the plan  {grown:7.0f} MB", end="")
            print(f"  {differ:.2e} of the codes differ")
        shares = {operator: round(share, 3) for operator, share in profile(plan, x, folder).items()}
        print("profile of the plan", json.dumps(shares))


if __name__ == "__main__":
    memory(*sys.argv[2:]) if sys.argv[1:2] == ["memory"] else main(*sys.argv[1:])
