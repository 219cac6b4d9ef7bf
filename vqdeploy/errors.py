"""The two errors that users see, and escaping of untrusted text.

The command line prints an error as one sentence and exits with its code. Text from files and arguments may contain
escape sequences, lone surrogates or megabytes: every error message, and every message to the logger `vqdeploy`, is
escaped and shortened here.
"""

import copyreg
import logging
from collections.abc import Collection
from reprlib import Repr

LONGEST = 480
"""Most characters of an error message."""

_EXTRAS = {
    "cuda": "onnxrt-gpu",
    "fastapi": "serve",
    "google": "triton-server",
    "grpc": "triton-server",
    "lightning": "train",
    "matplotlib": "bench",
    "msgpack": "import",
    "multipart": "serve",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "onnxrt",
    "onnxscript": "export",
    "polygraphy": "tensorrt-rtx",
    "prometheus_client": "serve",
    "pyarrow": "data",
    "ray": "ray",
    "safetensors": "export,train",
    "skimage": "train",
    "sklearn": "train",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "export,train",
    "triton": "kernels",
    "tritonclient": "triton-server",
    "uvicorn": "serve",
    "yaml": "import",
}

_NESTED = Repr()
_NESTED.maxlevel = 4
_NESTED.maxtuple = _NESTED.maxlist = _NESTED.maxdict = _NESTED.maxset = _NESTED.maxfrozenset = 24
_NESTED.maxstring = _NESTED.maxother = _NESTED.maxlong = 240


class VqdeployError(Exception):
    """Wrong usage or set-up: an invalid option, a missing file or package, no GPU.

    Args:
        what: What went wrong; a full stop at its end, as of another error, is left out.
        expected: The valid values.
        found: The actual value.
        fix: A command that fixes it.
    """

    exit_code = 2

    def __init__(self, what: str, *, expected: object = None, found: object = None, fix: str | None = None):
        parts = {
            "": what.removesuffix("."),
            "; expected ": expected,
            "; found " if expected is None else ", found ": found,
        }
        super().__init__(_sentence(parts | {". Fix: ": fix}) + ("" if fix else "."))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the sentence as it is, for errors of other processes."""
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]


class ArtifactError(VqdeployError):
    """A bad file: damaged, tampered with, of another version, or it failed a check."""

    exit_code = 1


def missing(package: str) -> VqdeployError:
    """The error for a package that cannot be imported; it names the extra that installs it."""
    root = package.partition(".")[0]
    wanted = f'"vqdeploy[{_EXTRAS[root]}]"' if root in _EXTRAS else root
    return VqdeployError(f"this needs the package {package}", fix=f"pip install {wanted}")


def shown(value: object, longest: int = 120) -> str:
    r"""Untrusted text for a terminal or a log: on one line, control characters escaped as `\x1b`.

    Args:
        value: Text, or any object.
        longest: Most characters; longer text is elided in the middle.
    """
    text = _text(value)
    if len(text) > 2 * longest:  # elide before escaping, for speed
        text = text[:longest] + text[-longest:]
    return _shortened(escaped(text), longest)


def one_line(value: object, longest: int = LONGEST) -> str:
    """Untrusted text for a sentence: as by `shown`, but line breaks and other white space become one space each."""
    return shown(" ".join(_text(value).split()), longest)


def show_record(record: logging.LogRecord) -> bool:
    """A log filter that passes all records and applies `shown` to their messages."""
    record.msg, record.args = shown(record.getMessage(), LONGEST), None
    return True


def can_be_shown(text: str) -> bool:
    """Whether a name has something to see, and nothing that breaks a line or moves the cursor."""
    return text.isprintable() and bool(text.strip())


def are_class_names(names: Collection[str]) -> bool:
    """Whether these can be the names of classes: each can be shown, and no two are the same."""
    return len(set(names)) == len(names) and all(map(can_be_shown, names))


def escaped(text: str) -> str:
    """Escapes control characters, lone surrogates and all other characters that are not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(value: object) -> str:
    try:
        # A few hundred bytes of YAML or of a pickle may nest lists that share their parts, with text without end.
        return _NESTED.repr(value) if type(value) in (dict, frozenset, list, set, tuple) else str(value)
    except Exception:  # str() of any object may fail, also of an int of more than 4300 digits
        return f"<{type(value).__name__}>"


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = max(longest - 3, 0) // 3
    return text[: max(longest - 3 - end, 0)] + "..." + text[len(text) - end :]


def _sentence(parts: dict[str, object]) -> str:
    """Joins the parts that are not None with their separators; shortens the longest until all fit."""
    texts = {joint: one_line(part) for joint, part in parts.items() if part is not None}
    room = LONGEST - 1 - sum(map(len, texts))
    fitting = (size for size in range(room, 0, -1) if sum(min(len(text), size) for text in texts.values()) <= room)
    longest = next(fitting)
    return "".join(joint + _shortened(text, longest) for joint, text in texts.items())
