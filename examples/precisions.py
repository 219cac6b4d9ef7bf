"""What does a lower precision cost, and what does it save? A Markdown table of plans with the same shipped weights.

    python examples/precisions.py rqvae.plan rqvae-int8.plan rqvae-int4.plan

Errors are those that `vqdeploy verify` finds, against PyTorch in fp32. Class accuracy is judged by a small classifier,
trained here on scikit-learn's digits, so the plans must have been trained on them; its interval is Wilson's, of 95 %.
Memory is the peak of a process that generates one image. An image is a generation and its decoding, timed in turns.
"""

import re
import statistics
import sys
import time
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from accuracy_by_steps import channels_first, train_judge

from vqdeploy.bench.plans import describe
from vqdeploy.runtime import Pipeline, load
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.verify import verify
from vqdeploy.verify.checks import limits

SAMPLES = 2000
TURNS = 31
Z = 1.96
COLUMNS = (
    "plan",
    "size",
    "KL divergence, nats",
    "total variation",
    "clear top-1 codes that differ",
    "largest difference of logits, of the largest",
    "worst decoded image",
    "class accuracy",
    "peak memory",
    "an image",
    "times as fast",
)


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of a number of trials."""
    middle, spread = share + Z**2 / (2 * count), Z * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (middle - spread) / (1 + Z**2 / count), (middle + spread) / (1 + Z**2 / count)


def accuracy(pipe: Pipeline, judge: ImageClassifier) -> str:
    """Class accuracy of samples, and its interval."""
    labels = [i % pipe.classes for i in range(SAMPLES)]
    share = judge.accuracy(channels_first(pipe.generate(labels, seed=3).images), torch.tensor(labels))
    low, high = interval(share, SAMPLES)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def errors(pipe: Pipeline) -> list[str]:
    """What `verify` finds, the worst of all levels, with guidance apart."""
    checks = verify(pipe.bundle.path)["checks"]

    def worst(ending: str, shown: str, relative: bool = False) -> str:
        found: dict[str, float] = {}
        for check in checks:
            if check["metric"].endswith(ending):
                kind = "guided " if "guid" in check["metric"] else ""
                unit = check["limit"] / limit_of(pipe, check["metric"]) if relative else 1.0
                found[kind] = max(check["value"] / unit, found.get(kind, 0.0))
        return ", ".join(f"{kind}{value:{shown}}" for kind, value in found.items()) or "-"

    return [
        worst("Kullback-Leibler divergence", ".1e"),
        worst("total variation distance", ".2g"),
        worst("share of clear top-1 codes that differ", ".2%"),
        worst("largest difference of logits", ".2g", relative=True),
        decoded([check for check in checks if check["stage"] == "decode"]),
    ]


def limit_of(pipe: Pipeline, metric: str) -> float:
    """The limit of a difference of logits, of the largest, for the stages of the level that a metric is about."""
    level = re.match(r"\w*", metric)[0]
    names = [stage.name for stage in pipe.manifest.stages]
    return limits(pipe.manifest, *(name for name in names if name == "step" or name.startswith(f"{level}_"))).logits


def decoded(checks: list[dict[str, Any]]) -> str:
    """The PSNR of the worst image against PyTorch's, or by how many grey levels a pixel is off."""
    values = {check["metric"]: check["value"] for check in checks}
    psnr = [value for metric, value in values.items() if metric.startswith("PSNR")]
    return f"{psnr[0]:.1f} dB" if psnr else f"{values['largest difference in grey levels']:.0f} grey levels"


def seconds(pipes: list[Pipeline]) -> list[float]:
    """Median time of an image of each plan, called in turns."""
    times: list[list[float]] = [[] for _ in pipes]
    for turn in range(TURNS):
        for pipe, own in zip(pipes, times, strict=True):
            start = time.perf_counter()
            pipe.generate([turn % pipe.classes], seed=turn)
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


def main(*plans: str) -> None:
    """Prints a row for each plan; the first is the one that the others are compared with in speed."""
    pipes = [load(plan) for plan in plans]
    judge = train_judge(pipes[0].image_shape[0])
    times = seconds(pipes)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for pipe, own in zip(pipes, times, strict=True):
        path, facts = Path(pipe.bundle.path), describe(pipe, threads=0)
        peak = f"{facts['peak_mb']:.0f} MB" if "peak_mb" in facts else "-"
        speed = [peak, f"{own * 1e3:.1f} ms", f"{times[0] / own:.2f}"]
        row = [path.stem, f"{path.stat().st_size / 1e6:.2f} MB", *errors(pipe), accuracy(pipe, judge), *speed]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
