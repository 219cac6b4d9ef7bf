"""One stage of training: fit a module to the data, take up where a cut left it."""

import logging
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler

from vqdeploy.training.data import Data

logger = logging.getLogger("vqdeploy")
_CHECKS = 10  # validations and saved states in a stage, fewer when it is short


def run_stage(module: LightningModule, data: Data, steps: int, batch_size: int, state: Path, **options: Any) -> None:
    """Trains for a number of steps, or what is left of them when `state` has been written before.

    Args:
        module: What to train.
        data: What on.
        steps: Batches to train on in all.
        batch_size: Images in a batch.
        state: The file that holds the state, written now and then, at an interrupt and at the end.
        options: More options of Lightning's Trainer.

    Raises:
        KeyboardInterrupt: The user cut it; the state is written.
    """
    _quiet()
    every = min(steps, max(steps // _CHECKS, 20))
    keeper = ModelCheckpoint(
        state.parent, state.stem, every_n_train_steps=every, save_on_exception=True, enable_version_counter=False
    )
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        val_check_interval=every,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        callbacks=[keeper, _Progress(state.stem)],
        default_root_dir=state.parent,
        **options,
    )
    _fit(trainer, module, _loaders(data, steps, batch_size), state)
    trainer.save_checkpoint(state)


class _Progress(RichProgressBar):
    """A bar on stderr that names the stage; its epochs mean nothing here."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=True, console_kwargs={"stderr": True})
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage


def _fit(trainer: Trainer, module: LightningModule, loaders: list[DataLoader], state: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, *loaders, ckpt_path=state if state.exists() else None, weights_only=True)
    except SystemExit as error:  # Lightning makes this of Ctrl-C, and ignores a second one from then on
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _loaders(data: Data, steps: int, batch_size: int) -> list[DataLoader]:
    """A loader whose one epoch is the whole training, so that the progress bar counts to its end, and one to check."""
    sampler = RandomSampler(data.train, replacement=True, num_samples=steps * batch_size)
    return [DataLoader(data.train, batch_size, sampler=sampler), DataLoader(data.held_out, batch_size)]


def _quiet() -> None:
    """Hides advice about workers, loggers and strategies, which the user of a recipe cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.02) -> LambdaLR:
    """A learning rate that climbs during a share of the steps and falls to zero along a cosine."""
    climb = max(warm_up * steps, 1)
    return LambdaLR(optimizer, lambda step: min((step + 1) / climb, 1) * (1 + math.cos(math.pi * step / steps)) / 2)


def images_of(dataset: torch.utils.data.Dataset, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images [N, 3, R, R] of a dataset, or all, and their labels [N]."""
    items = [dataset[i] for i in range(min(count or len(dataset), len(dataset)))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
