"""How many samples of a plan show the digit that was asked for? A Markdown table, with confidence intervals.

    python examples/class_accuracy.py rqvae.plan rqvae-int8.plan

The judge is a small classifier, trained here on scikit-learn's digits, so the plans must have been trained on them.
Intervals are Wilson's, of 95 %.
"""

import sys
from math import sqrt
from pathlib import Path

import torch
from accuracy_by_steps import channels_first, train_judge

from vqdeploy.runtime import load

SAMPLES = 2000
Z = 1.96


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of a number of trials."""
    middle, spread = share + Z**2 / (2 * count), Z * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (middle - spread) / (1 + Z**2 / count), (middle + spread) / (1 + Z**2 / count)


def main(*plans: str) -> None:
    """Prints a row for each plan."""
    judge = None
    print(f"| plan | MB | class accuracy of {SAMPLES:,} samples | 95 % interval |\n|---|---|---|---|")
    for plan in plans:
        pipe = load(plan)
        judge = judge or train_judge(pipe.image_shape[0])
        labels = [i % pipe.classes for i in range(SAMPLES)]
        images = channels_first(pipe.generate(labels, seed=3).images)
        accuracy = judge.accuracy(images, torch.tensor(labels))
        low, high = interval(accuracy, SAMPLES)
        print(
            f"| {plan} | {Path(plan).stat().st_size / 1e6:.2f} | {accuracy:.1%} | {low:.1%} to {high:.1%} |", flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
