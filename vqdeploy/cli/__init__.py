"""The command line, one file per verb. Verbs import their dependencies inside functions, to keep `--help` fast."""

import io
import logging
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.bench import bench
from vqdeploy.cli.build import build
from vqdeploy.cli.env import env
from vqdeploy.cli.export import export
from vqdeploy.cli.import_ import import_checkpoint
from vqdeploy.cli.inspect import inspect
from vqdeploy.cli.models import models
from vqdeploy.cli.output import LineFormatter, fail, prepare_streams, say
from vqdeploy.cli.run import run
from vqdeploy.cli.serve import serve
from vqdeploy.cli.tokenize import tokenize
from vqdeploy.cli.train import train
from vqdeploy.cli.triton import triton
from vqdeploy.cli.verify import verify
from vqdeploy.errors import LONGEST, VqdeployError, missing, shown

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, or of the copy vendored by typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take a vector-quantized image generator from PyTorch to one deployable file, and run it.",
)
_VERBS = (models, train, import_checkpoint, export, build, run, serve, tokenize, triton, verify, bench, inspect, env)
for _verb in _VERBS:
    app.command("import" if _verb is import_checkpoint else None)(_verb)  # a Python keyword


def main() -> None:
    """Entry point: turns errors into one sentence and an exit code; tracebacks only with `-vv`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up as after an interrupt
    prepare_streams()
    sys.exit(_exit_code())


def _exit_code() -> int:
    """Runs the command line and returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except _UsageError as error:
        return _refuse(error)
    except VqdeployError as error:
        return fail(error, error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vqdeploy"):
            raise
        return fail(missing(error.name), 2)
    except MemoryError:
        return fail(VqdeployError("the request does not fit into memory"), 2)
    except OSError as error:
        reason = error.strerror or error
        return fail(VqdeployError(f"{error.filename or _unnamed()} cannot be read or written ({reason})"), 2)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except SystemExit as end:  # typer's way out when nobody reads its help
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return 0
    except Exception:
        say(traceback.format_exc())
        return 1


def _unnamed() -> str:
    """What an error without a file name is about: `Path.cwd` gives none when somebody removed the folder."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return "the current folder"
    return "a file"


def _refuse(error: Exception) -> int:
    """Prints the usage error of typer, escaped, since it repeats arguments."""
    text = io.StringIO()
    error.show(text)  # type: ignore[attr-defined]
    for line in text.getvalue().splitlines():
        say(shown(line, LONGEST))
    return 2


def _version(value: bool) -> None:
    if value:
        print(version("vqdeploy"))
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log more; -vv shows tracebacks.")] = 0,
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Options of every verb."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("vqdeploy").setLevel(level)
