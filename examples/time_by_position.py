"""Does a token cost more the more there are before it? Milliseconds of each engine call of one generation, as a plot.

python examples/time_by_position.py bench.plan curve.png
"""

import sys
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from vqdeploy.files import replacing_file
from vqdeploy.runtime import load


def main(plan: str, output: str, repeats: str = "3") -> None:
    """Draws the curve, the fastest of the repeats at each position."""
    pipe, runs = load(plan), []
    known = np.full((1, *pipe.grid), -1)
    for _ in range(int(repeats)):
        times = [time.perf_counter()]
        pipe.sample(known, [0], callback=lambda _, times=times: times.append(time.perf_counter()))
        runs.append(np.diff(times))
    curve = np.min(runs, 0) * 1e3
    quarter = len(curve) // 4
    print(f"first quarter {curve[:quarter].mean():.2f} ms a token, last quarter {curve[-quarter:].mean():.2f} ms")
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(curve, linewidth=0.8)
    axis.set_xlabel("position")
    axis.set_ylabel("ms a token")
    axis.set_ylim(0, np.percentile(curve, 99) * 1.2)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing_file(Path(output)) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
