"""One stage of training: fit a module to the data, take up where a cut left it."""

import contextlib
import logging
import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler

from vqdeploy.training.data import Data

_CHECKS = 10  # validations and saved states in a stage, fewer when it is short


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides advice about workers, loggers and strategies, which the user of a recipe cannot act on."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        lightning.setLevel(level)


@_quiet()
def run_stage(module: LightningModule, data: Data, steps: int, batch_size: int, state: Path, **options: Any) -> float:
    """Trains for a number of steps, or what is left of them when `state` has been written before.

    Args:
        module: What to train.
        data: What on.
        steps: Batches to train on in all.
        batch_size: Images in a batch.
        state: The file that holds the state, written now and then, at an interrupt and at the end.
        options: More options of Lightning's Trainer.

    Returns:
        Seconds of training, those before a cut included.

    Raises:
        KeyboardInterrupt: The user cut it; the state is written.
    """
    every = min(steps, max(steps // _CHECKS, 20))
    keeper = ModelCheckpoint(
        state.parent, state.stem, every_n_train_steps=every, save_on_exception=True, enable_version_counter=False
    )
    timer = Timer()
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        val_check_interval=every,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        callbacks=[keeper, timer, _Progress(state.stem)],
        default_root_dir=state.parent,
        **options,
    )
    # One epoch is the whole training, so that the progress bar counts to its end.
    sampler = RandomSampler(data.train, replacement=True, num_samples=steps * batch_size)
    batches = DataLoader(data.train, batch_size, sampler=sampler, num_workers=data.workers)
    held_out = DataLoader(data.held_out, batch_size, num_workers=data.workers)
    _fit(trainer, module, batches, held_out, state)
    trainer.save_checkpoint(state)
    return timer.time_elapsed()


class _Progress(RichProgressBar):
    """A bar on stderr that names the stage; its epochs mean nothing here."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=True, console_kwargs={"stderr": True})
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage


def _fit(trainer: Trainer, module: LightningModule, batches: DataLoader, held_out: DataLoader, state: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, batches, held_out, ckpt_path=state if state.exists() else None, weights_only=True)
    except SystemExit as error:  # Lightning makes this of Ctrl-C, and ignores a second one from then on
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.02) -> LambdaLR:
    """A learning rate that climbs during a share of the steps and falls to zero along a cosine."""
    climb = max(warm_up * steps, 1)
    return LambdaLR(optimizer, lambda step: min((step + 1) / climb, 1) * (1 + math.cos(math.pi * step / steps)) / 2)
