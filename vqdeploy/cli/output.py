"""What the command line prints. All of it goes through `write`: escaped, and no error when nobody reads it."""

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
    """Prints lines. When the reader has gone, as `head` does, this and all that follows is dropped.

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
    """Lets a stream end nowhere: what is still in its buffer would fail once more when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(message: str) -> None:
    """Prints to stderr: progress, notes and errors."""
    write(message, sys.stderr)


def finish(result: dict[str, Any], as_json: bool, message: str) -> None:
    """Prints what a verb has found to stdout: one JSON object, or a message."""
    write(to_json(result) if as_json else message, sys.stdout)


def fail(error: Exception, exit_code: int) -> int:
    """Prints an error as one sentence, with its traceback for `-vv`; returns the exit code."""
    if logging.getLogger("vqdeploy").isEnabledFor(logging.DEBUG):
        say(traceback.format_exc())
    say(f"error: {shown(error, LONGEST)}")
    return exit_code


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names what is being worked on; a line for each where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda name: say(f"{verb} {shown(name)}")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    with console.status(Text(verb), spinner=spinner) as status:
        yield lambda name: status.update(Text(f"{verb} {shown(name)}"))


class LineFormatter(logging.Formatter):
    """Log records on one line, shortened, of whichever library."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of logging)
        """The line without a traceback."""
        return shown(super().formatMessage(record), LONGEST)


def prepare_streams() -> None:
    """Lets names through that an ASCII terminal or log cannot show: as escapes, and not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
