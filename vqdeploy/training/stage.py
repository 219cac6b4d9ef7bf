"""One stage of training on Lightning, which can be interrupted and resumed.

A step depends only on the previous weights, the seed and its number: images come from `Draws`, and all generators are
seeded for each step. So a resumed run ends with the same weights as an uninterrupted one.
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
from vqdeploy.processes import safe_path
from vqdeploy.training.data import Data, Draws, Images, Item

_CHECKS = 10  # validations, and saved states, per stage
_FEWEST = 20  # least number of steps between two

Batch = list[Tensor] | str
"""Images and labels, or the error of an image."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides advice about workers, loggers and strategies, which users cannot follow."""
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
    """Trains for a number of steps, less those done before `state` was written.

    Args:
        module: The module to train.
        data: The dataset.
        steps: Total number of training steps.
        batch_size: Images in a batch.
        state: File of the training state, written periodically, at an interrupt and at the end.
        seed: Seed of the images and of all random numbers of a step.
        options: Further options of the Trainer of Lightning.

    Returns:
        Seconds of training, including those before an interrupt.

    Raises:
        ArtifactError: An image or the state is damaged.
        KeyboardInterrupt: The user interrupted it; the state is written.
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
        # The whole run is one epoch, so that the progress bar spans it.
        draws = Draws(data.train, seed, steps * batch_size)
        batches = _loader(draws, batch_size, data.workers, sampler=_Rest(done * batch_size, len(draws)))
        held_out = _loader(data.held_out, batch_size, data.workers)
        with _interrupt_kept(), safe_path():  # of loader processes, where they are not forked
            trainer.fit(module, batches, held_out, ckpt_path=state if done else None, weights_only=True)
    return keeper.seconds()


def _restore(module: LightningModule, state: Path, steps: int) -> tuple[int, float]:
    """Steps done before an interrupt, and their seconds; loads the weights if all are done."""
    if not state.exists():
        return 0, 0.0
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        done, seconds = int(saved["batches"]), float(saved["seconds"])
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        same = {name: tensor.shape for name, tensor in saved["state_dict"].items()} == shapes
        if not same or not 0 < done <= steps or not saved["loops"] or not saved["optimizer_states"]:
            raise ValueError("it is of another module or run")
        if done == steps:
            module.load_state_dict(saved["state_dict"])
    except Exception as error:  # parsers of PyTorch raise anything
        raise ArtifactError(f"{state} is damaged", fix="remove it, and this stage begins anew") from error
    return done, seconds


class _Rest(Sampler[int]):
    """Indices from `first` on; its length is the total, because Lightning counts steps before an interrupt."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.count))

    def __len__(self) -> int:
        return self.count


class _Told(Dataset[Item | str]):
    """Images, or errors in place of unreadable ones: raising in a loader process would add its traceback."""

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
    """Seeds each step, and writes the state between steps."""

    def __init__(self, state: Path, steps: int, every: int, seed: int, seconds: float, interrupts: "_Interrupts"):
        self.state, self.steps, self.every, self.seed, self.interrupts = state, steps, every, seed, interrupts
        self.batches, self.start = 0, time.monotonic() - seconds

    def seconds(self) -> float:
        """Seconds of training so far, including those before an interrupt."""
        return time.monotonic() - self.start

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        _check(batch)
        _seed(self.seed, index)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Batch, index: int, dataloader_idx: int = 0
    ) -> None:
        _check(batch)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: Batch, index: int
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
    """Seeds the generators of Python, numpy and PyTorch, on GPUs too."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(for_torch)


class _Interrupts:
    """Delays SIGINT and SIGTERM to the end of a step, so that the state is consistent.

    A second signal acts immediately.
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
        """Applies the delayed signal."""
        if self.pending is not None:
            number, self.pending = self.pending, None
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)


class _Progress(RichProgressBar):
    """A progress bar on stderr with the name of the stage, without epochs."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=True, console_kwargs={"stderr": True})
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage


@contextlib.contextmanager
def _interrupt_kept() -> Iterator[None]:
    """Re-raises KeyboardInterrupt, which Lightning turns into an exit."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from error


def schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.02) -> LambdaLR:
    """Linear warm-up for a fraction of the steps, then cosine decay to zero."""
    climb = max(warm_up * steps, 1)
    return LambdaLR(optimizer, lambda step: min((step + 1) / climb, 1) * (1 + math.cos(math.pi * step / steps)) / 2)
