"""What does a generator know of its classes? Linear probes of a prior's hidden states, layer by layer.

    python examples/linear_probe.py vitvqgan.plan probe.png
    python examples/linear_probe.py vitvqgan.plan probe.png 0 3

Fits a logistic regression to the features of scikit-learn's digits, without labels given to the prior, and draws its
accuracy on held-out digits over the layers: all of them, or those that are named.
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vqdeploy.files import replacing_file
from vqdeploy.runtime import Pipeline, load
from vqdeploy.training.data import images_of, open_data

PASSES = 5  # over the digits to train on, each time turned and shifted a little otherwise


def main(plan: str, output: str, *layers: str) -> None:
    """Prints the accuracies and draws them."""
    pipe, data = load(plan), open_data("digits", 32)
    sets = [images_of(data.train, np.random.default_rng(i)) for i in range(PASSES)]
    train, train_labels = (np.concatenate(part) for part in zip(*(probed(pipe, *part) for part in sets), strict=True))
    held_out, held_out_labels = probed(pipe, *images_of(data.held_out))
    accuracies = {}
    for layer in map(int, layers or range(train.shape[1])):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=10, max_iter=3000))
        probe.fit(train[:, layer], train_labels)
        accuracies[layer] = 100 * probe.score(held_out[:, layer], held_out_labels)
        print(f"behind {layer} layers: {accuracies[layer]:.1f} %")
    draw(accuracies, Path(output))


def probed(pipe: Pipeline, images: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features of images [N, 3, H, W], and their labels."""
    return pipe.features(images.permute(0, 2, 3, 1).numpy()), labels.numpy()


def draw(accuracies: dict[int, float], output: Path) -> None:
    """Accuracy over layers, as a PNG."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axis.plot(list(accuracies), list(accuracies.values()), marker="o")
    axis.set_xlabel("layers of the prior")
    axis.set_ylabel("linear probe on held-out digits, %")
    axis.set_xticks(list(accuracies))
    axis.spines[["top", "right"]].set_visible(False)
    with replacing_file(output) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
