"""How many steps does it take? Class accuracy and time of a masked prior's samples, as a Markdown table.

    python examples/accuracy_by_steps.py movq.plan

The judge is a small classifier, trained here on scikit-learn's digits, so the plan must have been trained on them.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from vqdeploy.runtime import load
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.data import images_of, open_data
from vqdeploy.training.metrics import diversity
from vqdeploy.training.recipe import recipe
from vqdeploy.training.stage import run_stage

SAMPLES = 1000
STEPS = (1, 2, 4, 8, 12, 16)


def train_judge(resolution: int) -> ImageClassifier:
    """A classifier of the digits."""
    data, settings = open_data("digits", resolution), recipe("movq", "tiny")
    seed_everything(0, verbose=False)
    judge = ImageClassifier(len(data.labels), settings)
    with tempfile.TemporaryDirectory() as folder:
        run_stage(judge, data, settings.classifier_steps, settings.batch_size, Path(folder) / "classifier.ckpt")
    return judge


def main(plan: str) -> None:
    """Prints the table."""
    pipe = load(plan)
    judge = train_judge(pipe.side)
    originals = images_of(open_data("digits", pipe.side).held_out)
    labels = [i % pipe.classes for i in range(SAMPLES)]
    print(f"classifier on held-out digits: {judge.accuracy(*originals):.1%}\n")
    print("| steps | class accuracy | diversity | prior, ms an image | decoder, ms an image |\n|---|---|---|---|---|")
    for steps in STEPS:
        start = time.perf_counter()
        samples = pipe.generate(labels, steps=steps)
        prior = time.perf_counter() - start - samples.timings["decode_s"]
        images, asked = torch.from_numpy(samples.images).permute(0, 3, 1, 2), torch.tensor(labels)
        accuracy, variety = judge.accuracy(images, asked), diversity(images, asked, *originals)
        times = f"{prior / SAMPLES * 1e3:.2f} | {samples.timings['decode_s'] / SAMPLES * 1e3:.2f}"
        print(f"| {steps} | {accuracy:.1%} | {variety:.2f} | {times} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
