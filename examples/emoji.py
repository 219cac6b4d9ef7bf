"""Sorts the emoji of the npm package `emoji-datasource-google` into folders of classes, to train on.

    npm pack emoji-datasource-google@16.0.0 && tar xf emoji-datasource-google-16.0.0.tgz
    python examples/emoji.py package emoji
    vqdeploy train --model movq --preset emoji --data emoji/train --held-out emoji/held-out

An example for folders of your own: each subfolder is a class. The pictures are Noto Emoji by Google, under the Apache
License 2.0. A tenth of the emoji of each class is held out, and none of the skin tones of these is trained on.
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.files import temporary_folder

_CATEGORIES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "faces",
    "Symbols": "symbols",
    "Travel & Places": "places",
}


def class_of(emoji: dict[str, Any]) -> str | None:
    """Its class: the category, but hands are no people, and hearts no faces."""
    part = emoji["subcategory"]
    if part.startswith("hand") or part == "body-parts":
        return "hands"
    if part in ("heart", "emotion"):
        return "symbols"
    return _CATEGORIES.get(emoji["category"])


def main(package: str, output: str) -> None:
    """Writes `train` and `held-out`, with a folder for each class."""
    source = Path(package)
    classes = defaultdict(list)
    for emoji in sorted(json.loads((source / "emoji.json").read_text()), key=lambda emoji: emoji["image"]):
        if emoji["has_img_google"] and (name := class_of(emoji)):
            tones = emoji.get("skin_variations", {}).values()
            classes[name].append([each["image"] for each in (emoji, *tones) if each["has_img_google"]])
    rng = np.random.default_rng(0)
    if Path(output).exists():
        raise SystemExit(f"{output} exists already")
    with temporary_folder(Path(output)) as new:
        for name, found in sorted(classes.items()):
            held_out = set(rng.permutation(len(found))[: len(found) // 10].tolist())
            for index, images in enumerate(found):
                part = "held-out" if index in held_out else "train"
                for image in images[:1] if index in held_out else images:
                    target = new / "all" / part / name / image
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / "img" / "google" / "64" / image, target)
            print(f"{name:10}  {len(found) - len(held_out)} emoji, and {len(held_out)} held out")
        (new / "all").rename(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
