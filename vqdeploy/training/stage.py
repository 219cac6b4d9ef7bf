"""One stage of training: fit a module to the data, take up where a cut left it.

A step depends on the weights before it, the seed and its number alone: the images come from `Draws`, and the generators
are seeded anew for each step. So a training that was cut ends with the weights of one that was not.
"""

import contextlib
import logging
import math
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import replacing_file
from vqdeploy.training.data import Data, Draws, Images, Item

_CHECKS = 10  # validations and saved states in a stage
_FEWEST = 20  # steps between two of them

Batch = list[Tensor] | str
"""Images and labels, or what is wrong with one of them."""


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
def run_stage(
    module: LightningModule, data: Data, steps: int, batch_size: int, state: Path, seed: int, **options: Any
) -> float:
    """Trains for a number of steps, or what is left of them when `state` has been written before.

    Args:
        module: What to train.
        data: What on.
        steps: Batches to train on in all.
        batch_size: Images in a batch.
        state: The file that holds the state, written now and then, at an interrupt and at the end.
        seed: Seed of the images and of all that a step draws.
        options: More options of Lightning's Trainer.

    Returns:
        Seconds of training, those before a cut included.

    Raises:
        ArtifactError: An image or the state is damaged.
        KeyboardInterrupt: The user cut it; the state is written.
    """
    every = min(steps, max(steps // _CHECKS, _FEWEST))
    done, seconds = _restore(module, state, steps)
    if done == steps:
        return seconds
    with _Interrupts() as interrupts:
        keeper = _Keeper(state, steps, every, seed, seconds, interrupts)
        trainer = Trainer(
            max_epochs=1,
            devices=1,
            val_check_interval=every,
            num_sanity_val_steps=0,
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[keeper, _Progress(state.stem)],
            default_root_dir=state.parent,
            **options,
        )
        # One epoch is the whole training, so that the progress bar counts to its end.
        draws = Draws(data.train, seed, steps * batch_size)
        batches = _loader(draws, batch_size, data.workers, sampler=_Rest(done * batch_size, len(draws)))
        held_out = _loader(data.held_out, batch_size, data.workers)
        with _interrupt_kept():
            trainer.fit(module, batches, held_out, ckpt_path=state if done else None, weights_only=True)
    return keeper.seconds()


def _restore(module: LightningModule, state: Path, steps: int) -> tuple[int, float]:
    """The steps that were done before a cut and their seconds. When all were, the module gets its weights."""
    if not state.exists():
        return 0, 0.0
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        done, seconds = int(saved["batches"]), float(saved["seconds"])
        if done == steps:
            module.load_state_dict(saved["state_dict"])
    except Exception as error:  # PyTorch raises what its parsers raise
        raise ArtifactError(f"{state} is damaged", fix="remove it, and this stage begins anew") from error
    return done, seconds


class _Rest(Sampler[int]):
    """The places from `first` on; as long as all of them, because Lightning counts those before a cut."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.count))

    def __len__(self) -> int:
        return self.count


class _Told(Dataset[Item | str]):
    """Images; in place of one that cannot be read what is wrong: a loader process would add its traceback."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item | str:
        try:
            return self.images[index]
        except VqdeployError as error:
            return str(error).removesuffix(".")


def _collate(items: list[Item | str]) -> Batch:
    for item in items:
        if isinstance(item, str):
            return item
    batch: list[Tensor] = default_collate(items)
    return batch


def _loader(images: Images, batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> DataLoader[Any]:
    return DataLoader(_Told(images), batch_size, sampler=sampler, num_workers=workers, collate_fn=_collate)


class _Keeper(Callback):
    """Seeds each step, and writes the state between two."""

    def __init__(self, state: Path, steps: int, every: int, seed: int, seconds: float, interrupts: "_Interrupts"):
        self.state, self.steps, self.every, self.seed, self.interrupts = state, steps, every, seed, interrupts
        self.batches, self.start = 0, time.monotonic() - seconds

    def seconds(self) -> float:
        """Seconds of training so far, those before a cut included."""
        return time.monotonic() - self.start

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        _check(batch)
        _seed(self.seed, index)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Batch, index: int, dataloader_idx: int = 0
    ) -> None:
        _check(batch)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        self.batches = index + 1
        if self.batches % self.every == 0 or self.batches == self.steps or self.interrupts.pending:
            with replacing_file(self.state) as file:
                trainer.save_checkpoint(file)
        self.interrupts.act()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"batches": self.batches, "seconds": self.seconds()}


def _check(batch: Batch) -> None:
    if isinstance(batch, str):
        raise ArtifactError(batch)


def _seed(*numbers: int) -> None:
    """Seeds the generators of Python, numpy and PyTorch, those on GPUs too."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(for_torch)


class _Interrupts:
    """Holds an interrupt or a request to end back until a step is done, so that the state is whole.

    A second one acts at once.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self.handlers[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if not any(error):
            self.act()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        again, self.pending = self.pending is not None, number
        if again:
            self.act()

    def act(self) -> None:
        """Does what the signal that came would have done."""
        if self.pending is not None:
            number, self.pending = self.pending, None
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)


class _Progress(RichProgressBar):
    """A bar on stderr that names the stage; its epochs mean nothing here."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=True, console_kwargs={"stderr": True})
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage


@contextlib.contextmanager
def _interrupt_kept() -> Iterator[None]:
    """Lets an interrupt through, which Lightning turns into an exit."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from error


def schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.02) -> LambdaLR:
    """A learning rate that climbs during a share of the steps and falls to zero along a cosine."""
    climb = max(warm_up * steps, 1)
    return LambdaLR(optimizer, lambda step: min((step + 1) / climb, 1) * (1 + math.cos(math.pi * step / steps)) / 2)
