"""A training run: three stages, the measurements, the checkpoint."""

import dataclasses
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from vqdeploy.checkpoint import FILES, check_digest, check_finite, digest, load, save
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import (
    check_apart,
    check_outside,
    check_replaceable,
    named,
    read_json,
    real,
    replacing_folder,
    temporary_folder,
    write_json,
)
from vqdeploy.models.pixels import channels_last
from vqdeploy.runtime.images import write_grid
from vqdeploy.systems import Recipe, System, SystemConfig, create, definition
from vqdeploy.systems import preset as find_preset
from vqdeploy.training.classifier import ImageClassifier
from vqdeploy.training.data import NAMED, Data, images_of, open_data
from vqdeploy.training.metrics import codebook_use, decode, diversity, generate, psnr, reconstruct
from vqdeploy.training.prior import PriorTraining
from vqdeploy.training.stage import run_stage
from vqdeploy.training.tokenizer import TokenizerTraining

if TYPE_CHECKING:
    from vqdeploy.shards import Origin

_SAMPLES = 1000  # samples for the reported class accuracy
_LARGEST_SEED = 2**32 - 1  # that numpy's global generator takes


def train(
    model: str = "rqvae",
    preset: str = "tiny",
    data: str = "digits",
    *,
    output: Path,
    seed: int = 0,
    resume: bool = False,
    samples: int = _SAMPLES,
    tokenizer: Path | None = None,
    held_out: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains the tokenizer, then the prior, and writes the checkpoint with image grids.

    The state of an unfinished run is in the folder `OUTPUT.training` beside `output`.

    Args:
        model: The system.
        preset: Its configuration; classes and labels are replaced by those of the data.
        data: `digits`, `photos`, or the path of an image folder or of a folder of codes, which take the `tokenizer`
            that made them.
        output: Folder of the checkpoint.
        seed: Seed of weights, batches and samples.
        resume: Whether to resume an interrupted run, with the same options.
        samples: Images to generate for the reported class accuracy.
        tokenizer: Checkpoint folder whose tokenizer is kept as it is, so that only a prior is trained on its codes.
        held_out: Image folder with the same classes to measure on; a tenth of the images by default.
        options: Fields of `Recipe` that replace those of the recipe of the preset, unless None.

    Returns:
        The content of `training.json`: the recipe, and under `metrics` those of the stored weights.

    Raises:
        VqdeployError: An option, the data or the output folder is invalid, or the data have changed since the
            interrupt.
        ArtifactError: An image or the state is damaged, or the weights are not finite.
        KeyboardInterrupt: The user interrupted it; `resume` continues from there.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise VqdeployError("seed is out of range", expected=f"0..{_LARGEST_SEED}", found=seed)
    output = named(output)
    data_folders = [Path(path) for path in (None if data in NAMED else data, held_out) if path]
    for folder in (output, _state_of(output)):
        check_outside(folder, [*data_folders, *([] if tokenizer is None else [tokenizer])])
        check_apart(folder, data_folders)
    if len(data_folders) == 2 and len(set(map(real, data_folders))) == 1:
        raise VqdeployError("the images to train on are those that are held out", found=str(held_out))
    config = find_preset(model, preset)
    given = {name: value for name, value in options.items() if value is not None}
    kept = None if tokenizer is None else load(tokenizer)
    if kept is not None:
        config = _on_tokenizer(config, kept)
    recipe = dataclasses.replace(definition(model).recipe(preset), **given)
    if kept is not None and not _is_exact(kept.tokenizer, getattr(torch, recipe.stored_dtype)):
        recipe = dataclasses.replace(recipe, stored_dtype="float32")  # rounded, it would give other codes
    source = open_data(data, config.tokenizer.resolution, held_out, recipe)
    if source.origin is not None:
        _check_origin(Path(data), source.origin, kept)
    system = create(_adapt(config, source), seed)
    if kept is not None:
        system.tokenizer.load_state_dict(kept.tokenizer.state_dict())
    seed_everything(seed, verbose=False)  # for the discriminator
    first = TokenizerTraining(system.tokenizer, recipe)
    asked: dict[str, Any] = {"model": model, "preset": preset, "data": data, "data_fingerprint": source.fingerprint}
    asked |= {"held_out": held_out and str(held_out), "seed": seed, "recipe": recipe.to_dict()}
    if kept is not None:
        asked["tokenizer"] = digest(kept)
    state = _prepare(output, asked, resume)
    seconds, classifier = _train(system, None if kept else first, recipe, source, seed, state)
    _round(system.eval(), getattr(torch, recipe.stored_dtype))
    check_finite(system.state_dict(), f"the system stored as {recipe.stored_dtype}")
    training = asked | {"versions": _versions(), "seconds": seconds}
    training["metrics"], sheets = _measure(system, source, classifier, seed, samples)
    with replacing_folder(output, FILES) as new:
        save(system, new, training, getattr(torch, recipe.stored_dtype))
        for name, images in sheets.items():
            pixels = channels_last(images.flatten(0, 1)).numpy()
            write_grid(new / f"{name}.png", pixels, columns=images.shape[1], note=training)
    with temporary_folder(state) as old:  # so that an interrupt here leaves no partial state
        os.replace(state, old / state.name)
    return training


def _check_origin(folder: Path, origin: "Origin", kept: System | None) -> None:
    """Rejects codes without the tokenizer that made them."""
    if kept is None:
        fix = "name the checkpoint it was made from, --tokenizer FOLDER"
        raise VqdeployError(f"{folder} holds codes, on which only a prior can be trained", fix=fix)
    check_digest(kept, origin.checkpoint, folder, "--tokenizer")
    if kept.tokenizer.maps != origin.maps:
        expected, found = list(kept.tokenizer.maps), list(origin.maps)
        raise VqdeployError(f"the codes in {folder} are of images of another size", expected=expected, found=found)


def _on_tokenizer(config: SystemConfig, kept: System) -> SystemConfig:
    """The configuration with a prior for the codes of an existing tokenizer."""
    tokenizer: Any = kept.config.tokenizer
    prior = config.prior
    wanted: type[Any] = definition(config.model).tokenizer_config
    if not isinstance(tokenizer, wanted):
        raise VqdeployError(
            f"{config.model} has another kind of tokenizer", fix=f"--model {kept.config.model}, or one that fits"
        )
    if prior is None:
        raise VqdeployError(f"{config.preset} has no prior to train", fix="vqdeploy models")
    known = {field.name for field in dataclasses.fields(prior)}
    fields = {"codebook_size": tokenizer.codebook_size, "code_dim": tokenizer.code_dim, "grid": tokenizer.grid}
    fields["sides"] = getattr(tokenizer, "sides", None)
    if "levels" in known:
        grids = tokenizer.level_grids
        if len(grids) != len(prior.levels):
            raise VqdeployError(
                f"{config.preset} has another number of levels", expected=len(prior.levels), found=len(grids)
            )
        fields["levels"] = tuple(
            dataclasses.replace(level, grid=grid) for level, grid in zip(prior.levels, grids, strict=True)
        )
    prior = dataclasses.replace(prior, **{name: value for name, value in fields.items() if name in known})
    return dataclasses.replace(config, tokenizer=tokenizer, prior=prior, source=kept.config.source)


def _adapt(config: SystemConfig, data: Data) -> SystemConfig:
    """The configuration with the classes of the data."""
    if config.prior is None:
        return dataclasses.replace(config, labels=data.labels)
    if getattr(config.prior, "condition_length", 1) > 1:
        raise VqdeployError(f"{config.preset} is conditioned on text and cannot be trained", fix="vqdeploy models")
    prior = dataclasses.replace(config.prior, classes=max(len(data.labels), 1))
    return dataclasses.replace(config, prior=prior, labels=data.labels)


def _prepare(output: Path, asked: dict[str, Any], resume: bool) -> Path:
    """The folder of the state, after all checks that are possible before training."""
    check_replaceable(output, FILES)
    state = _state_of(output)
    if state.exists() and not resume:
        raise VqdeployError(f"{state} holds an interrupted training run", fix="add --resume, or remove that folder")
    if not state.exists():
        if resume:
            raise VqdeployError(f"{output} has no interrupted training run", fix="run it without --resume")
        with replacing_folder(state, ("asked.json",)) as new:
            write_json(new / "asked.json", asked)
    before = read_json(state / "asked.json")
    if not isinstance(before, dict) or not isinstance(before.get("recipe"), dict):
        raise ArtifactError(f"{state / 'asked.json'} is damaged", fix=f"remove {state}")
    if before.get("data_fingerprint") != asked["data_fingerprint"]:
        fix = f"put the images back as they were, or remove {state}"
        raise VqdeployError(f"the images of {asked['data']} have changed since the training was interrupted", fix=fix)
    _compare(_flat(before), _flat(asked))
    return state


def _state_of(output: Path) -> Path:
    """The folder of the state of an unfinished run."""
    return output.with_name(output.name + ".training")


def _flat(asked: dict[str, Any]) -> dict[str, Any]:
    return {**asked, **asked["recipe"], "recipe": None}


def _compare(before: dict[str, Any], asked: dict[str, Any]) -> None:
    if odd := sorted(key for key in before | asked if before.get(key) != asked.get(key)):
        expected, found = (", ".join(f"{key} {side.get(key)}" for key in odd) for side in (before, asked))
        raise VqdeployError("the interrupted training run had other options", expected=expected, found=found)


def _train(
    system: System, first: TokenizerTraining | None, recipe: Recipe, data: Data, seed: int, state: Path
) -> tuple[dict[str, float], ImageClassifier | None]:
    """Runs the three stages, or the last two without `first`. Returns the seconds of each, and the classifier."""
    seconds: dict[str, float] = {}

    def stage(name: str, module: LightningModule, steps: int, **options: Any) -> None:
        seed_everything(seed, verbose=False)
        elapsed = run_stage(module, data, steps, recipe.batch_size, state / f"{name}.ckpt", seed, **options)
        seconds[name] = round(elapsed, 1)
        check_finite(module.state_dict(), f"what the stage {name} has trained")

    if first is not None:
        stage("tokenizer", first, recipe.steps)
    if system.prior is None:
        return seconds, None
    classifier = None
    if len(data.labels) > 1 and data.origin is None:  # it judges pictures
        seed_everything(seed, verbose=False)
        classifier = ImageClassifier(len(data.labels), recipe)
        stage("classifier", classifier, recipe.classifier_steps)
    stage("prior", PriorTraining(system, recipe, classifier), recipe.prior_steps, gradient_clip_val=1.0)
    return seconds, classifier


def _measure(
    system: System, data: Data, classifier: ImageClassifier | None, seed: int, samples: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metrics on held-out images and samples, and images to inspect."""
    images, labels = images_of(data.held_out)
    metrics: dict[str, Any] = {}
    if data.origin is None:
        reconstructions, codes = reconstruct(system.tokenizer, images)
        metrics["reconstruction_psnr"] = psnr(reconstructions, images)
        sheets = {"reconstructions": torch.stack([images[:10], reconstructions[:10]])}
    else:
        codes = images
        sheets = {"reconstructions": decode(system.tokenizer, codes[:10])[None]}
    metrics |= codebook_use(system.tokenizer.depths(codes), system.config.tokenizer.codebook_size)
    if system.prior is not None:
        classes = system.config.prior.classes
        asked = torch.arange(samples) % classes
        drawn = generate(system, asked, seed)
        rows = [drawn[asked == label][:10] for label in range(classes)]
        sheets["samples"] = torch.stack([row for row in rows if len(row) == len(rows[0])])
        metrics["samples"] = samples
        if classifier is not None:
            metrics["classifier_accuracy"] = classifier.accuracy(images, labels)
            metrics["class_accuracy"] = classifier.accuracy(drawn, asked)
            metrics["sample_diversity"] = diversity(drawn, asked, images, labels)
    return metrics, sheets


def _round(system: System, dtype: torch.dtype) -> None:
    """Rounds weights as they are stored; constants that are not, such as matrices of a resizing, stay exact."""
    system.load_state_dict(_rounded(system, dtype))


def _is_exact(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether rounding changes no weight."""
    rounded = _rounded(module, dtype)
    return all(torch.equal(weight, rounded[name]) for name, weight in module.state_dict().items())


def _rounded(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = module.state_dict().items()
    return {name: w.to(dtype).to(w.dtype) if w.is_floating_point() else w for name, w in weights}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("vqdeploy", "torch", "lightning", "numpy")}
