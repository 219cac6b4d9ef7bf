"""The two errors that users see. The command line prints them as one sentence and exits with their code."""


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
        sentence = what
        if expected is not None:
            sentence += f"; expected {expected}"
        if found is not None:
            sentence += f", found {found}" if expected is not None else f"; found {found}"
        super().__init__(sentence + "." + (f" Fix: {fix}" if fix else ""))


class ArtifactError(VqdeployError):
    """A file is at fault: damaged, tampered with, of another version, or a check on it failed."""

    exit_code = 1
