"""The two errors that users see, and text from outside as it may be shown.

The command line prints an error as one sentence and exits with its code. What comes out of a file or was typed may hold
escape sequences, lone surrogates or a megabyte of text: every sentence, and every message to the logger `vqdeploy`, is
escaped and shortened here.
"""

import logging

LONGEST = 480
"""Characters of an error's sentence, at most."""

_EXTRAS = {
    "cuda": "onnxrt-gpu",
    "lightning": "train",
    "matplotlib": "bench",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "onnxrt",
    "onnxscript": "export",
    "polygraphy": "tensorrt-rtx",
    "safetensors": "export,train",
    "skimage": "train",
    "sklearn": "train",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "export,train",
    "triton": "kernels",
}


class VqdeployError(Exception):
    """Usage or set-up is at fault: a wrong option, a missing file or package, no GPU.

    Args:
        what: What went wrong, without a full stop.
        expected: What would have been right.
        found: What was there instead.
        fix: A command that mends it.
    """

    exit_code = 2

    def __init__(self, what: str, *, expected: object = None, found: object = None, fix: str | None = None):
        parts = {"": what, "; expected ": expected, "; found " if expected is None else ", found ": found}
        super().__init__(_sentence(parts | {". Fix: ": fix}) + ("" if fix else "."))


class ArtifactError(VqdeployError):
    """A file is at fault: damaged, tampered with, of another version, or a check on it failed."""

    exit_code = 1


def missing(package: str) -> VqdeployError:
    """The error for a package that cannot be imported: it names the extra that brings it."""
    root = package.partition(".")[0]
    wanted = f'"vqdeploy[{_EXTRAS[root]}]"' if root in _EXTRAS else root
    return VqdeployError(f"this needs the package {package}", fix=f"pip install {wanted}")


def shown(value: object, longest: int = 120) -> str:
    r"""A value from outside, for a terminal or a log: on one line, with `\x1b` for what would control a terminal.

    Args:
        value: Text, or anything that has some.
        longest: Characters at most; the middle of a longer text is left out.
    """
    text = _text(value)
    if len(text) > 2 * longest:  # a megabyte need not be escaped to be left out
        text = text[:longest] + text[-longest:]
    return _shortened(escaped(text), longest)


def show_record(record: logging.LogRecord) -> bool:
    """A filter of log records that shows their messages as `shown` does; it lets all pass."""
    record.msg, record.args = shown(record.getMessage(), LONGEST), None
    return True


def escaped(text: str) -> str:
    """Text with escapes in the place of control characters, lone surrogates and whatever else does not print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # of any object's own; a number of more than 4300 digits has no text either
        return f"<{type(value).__name__}>"


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = max(longest - 3, 0) // 3
    return text[: max(longest - 3 - end, 0)] + "..." + text[len(text) - end :]


def _sentence(parts: dict[str, object]) -> str:
    """The parts that are not None, each behind its joint; the longest are shortened until all fit."""
    texts = {joint: shown(" ".join(_text(part).split()), LONGEST) for joint, part in parts.items() if part is not None}
    room = LONGEST - 1 - sum(map(len, texts))
    fitting = (size for size in range(room, 0, -1) if sum(min(len(text), size) for text in texts.values()) <= room)
    longest = next(fitting)
    return "".join(joint + _shortened(text, longest) for joint, text in texts.items())
