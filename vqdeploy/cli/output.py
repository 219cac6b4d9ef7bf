"""All output of the command line: escaped, and without an error on a closed pipe."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from vqdeploy.errors import LONGEST, VqdeployError, escaped, shown
from vqdeploy.files import to_json


def write(text: str, stream: TextIO) -> None:
    """Prints lines. After a broken pipe, as with `head`, this and all later output is dropped.

    Raises:
        VqdeployError: The stream cannot be written to, as on a full disk.
    """
    try:
        print("\n".join(map(escaped, text.split("\n"))), file=stream, flush=True)
    except BrokenPipeError:
        _mute(stream)
    except OSError as error:
        _mute(stream)
        raise VqdeployError(f"the output cannot be written ({error.strerror})") from error


def _mute(stream: TextIO) -> None:
    """Redirects a broken stream to the null device: flushing its buffer at exit would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(message: str) -> None:
    """Prints progress, notes and errors to stderr; where that cannot be, the work goes on."""
    with contextlib.suppress(VqdeployError):
        write(message, sys.stderr)


def finish(result: dict[str, Any], as_json: bool, message: str) -> None:
    """Prints the result of a verb to stdout: one JSON object, or a message."""
    write(to_json(result) if as_json else message, sys.stdout)


def fail(error: Exception, exit_code: int) -> int:
    """Prints an error as one sentence, with a traceback under `-vv`; returns the exit code."""
    if logging.getLogger("vqdeploy").isEnabledFor(logging.DEBUG):
        say(traceback.format_exc())
    say(f"error: {shown(error, LONGEST)}")
    return exit_code


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that shows the current item; one line per item if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda name: say(f"{verb} {shown(name)}")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    with console.status(Text(verb), spinner=spinner) as status:
        yield lambda name: status.update(Text(f"{verb} {shown(name)}"))


@contextlib.contextmanager
def counting(verb: str, things: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, fed with (done, total, note); one line per update if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, note: say(f"{verb} {done} of {total} {things}, {note}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(things), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


class LineFormatter(logging.Formatter):
    """Formats log records of any library on one line, escaped and shortened."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of logging)
        """The message without a traceback."""
        return shown(super().formatMessage(record), LONGEST)


def prepare_streams() -> None:
    """Makes the standard streams escape characters that their encoding lacks, instead of raising.

    Closed ones become the null device, in their order, so that no file that is opened later takes their descriptors.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
