"""How well does a masked prior do, in how many steps? Two Markdown tables about its samples and its completions.

    python examples/accuracy_by_steps.py movq.plan
    python examples/accuracy_by_steps.py movq.plan 1

The number is the guidance scale; the plan's default when left out. The judge is a small classifier, trained here on
scikit-learn's digits, so the plan must have been trained on them.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything

from vqdeploy.runtime import Pipeline, load
from vqdeploy.systems import definition
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.data import images_of, open_data
from vqdeploy.training.metrics import diversity
from vqdeploy.training.stage import run_stage

SAMPLES = 1000
STEPS = (1, 2, 4, 8, 12, 16)
RATIOS = (0.5, 0.75, 0.9, 0.95, 1.0)


def train_judge(resolution: int) -> ImageClassifier:
    """A classifier of the digits."""
    data, settings = open_data("digits", resolution), definition("movq").recipe("tiny")
    seed_everything(0, verbose=False)
    judge = ImageClassifier(len(data.labels), settings)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "classifier.ckpt"
        run_stage(judge, data, settings.classifier_steps, settings.batch_size, state, seed=0)
    return judge


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Images [N, H, W, 3] as the judge takes them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def samples_by_steps(pipe: Pipeline, judge: ImageClassifier, options: dict[str, float]) -> None:
    """Prints class accuracy, diversity and time of samples."""
    originals, labels = (
        images_of(open_data("digits", pipe.image_shape[0]).held_out),
        [i % pipe.classes for i in range(SAMPLES)],
    )
    asked = torch.tensor(labels)
    print("| steps | class accuracy | diversity | prior, ms an image | decoder, ms an image |\n|---|---|---|---|---|")
    for steps in STEPS:
        start = time.perf_counter()
        samples = pipe.generate(labels, steps=steps, **options)
        prior = time.perf_counter() - start - samples.timings["decode_s"]
        images = channels_first(samples.images)
        accuracy, variety = judge.accuracy(images, asked), diversity(images, asked, *originals)
        times = f"{prior / SAMPLES * 1e3:.1f} | {samples.timings['decode_s'] / SAMPLES * 1e3:.1f}"
        print(f"| {steps} | {accuracy:.1%} | {variety:.2f} | {times} |")


def completions_by_ratio(pipe: Pipeline, judge: ImageClassifier) -> None:
    """Prints how many completions of held-out digits are of their class, without and with the label given."""
    images, labels = images_of(open_data("digits", pipe.image_shape[0]).held_out)
    originals = images.permute(0, 2, 3, 1).numpy()
    kinds = [(None, 1), (None, 8), (labels.tolist(), 1), (labels.tolist(), 8)]
    print("| masked | 1 step | 8 steps | 1 step, label given | 8 steps, label given |\n|---|---|---|---|---|")
    for ratio in RATIOS:
        shares = []
        for given, steps in kinds:
            top_k = 1 if steps == 1 else 0
            completed = pipe.inpaint(originals, given, mask_ratio=ratio, steps=steps, top_k=top_k).images
            shares.append(f"{judge.accuracy(channels_first(completed), labels):.1%}")
        print(f"| {ratio:.0%} | {' | '.join(shares)} |")


def main(plan: str, guidance_scale: str = "") -> None:
    """Prints both tables."""
    pipe = load(plan)
    judge = train_judge(pipe.image_shape[0])
    options = {"guidance_scale": float(guidance_scale)} if guidance_scale else {}
    samples_by_steps(pipe, judge, options)
    print()
    completions_by_ratio(pipe, judge)


if __name__ == "__main__":
    main(*sys.argv[1:])
