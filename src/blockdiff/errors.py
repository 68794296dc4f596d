"""The one error a user should ever read: what is wrong and how to mend it, in one line."""

from importlib import import_module
from types import ModuleType


class InputError(ValueError):
    """Bad input from outside (an option, a file, a checkpoint).

    Library callers catch it as a `ValueError`; the command line prints its message as one line
    and exits with code 2.

    Example:
        >>> import blockdiff
        >>> try:
        ...     blockdiff.SamplingOptions(max_new_tokens=0)
        ... except blockdiff.InputError as error:
        ...     print(error)
        `max_new_tokens` is 0; it must be at least 1
    """


class WrongAnswer(InputError):
    """An order, a rule or a processor, from outside the package perhaps, that answers wrongly.

    Or a network, whose logits are no numbers: who asked for a text is not to blame.
    """


class RunStopped(InputError):
    """A run that ended before its time, with all of it that is good on the disk.

    The command line prints the message as one line and exits with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a one-line message."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return next(iter(text.splitlines()), type(error).__name__)


def need(*modules: str, extra: str, what: str) -> ModuleType:
    """The first of these modules, all of them imported; `InputError` where one is not installed.

    `extra`: what of blockdiff installs them; `what`: what needs them. Called before any work, so
    that a program without the extra hears of it at once.

    Example:
        >>> from blockdiff.errors import InputError, need
        >>> need("json", extra="serve", what="the server").__name__
        'json'
        >>> try:
        ...     need("no_such_module", extra="serve", what="the server")
        ... except InputError as error:
        ...     print(error)
        the server needs no_such_module: pip install 'blockdiff[serve]'
    """
    try:
        first, *_ = [import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        missing = error.name or modules[0]
    except ImportError as error:  # it is there, and cannot be imported
        missing = f"{modules[0].partition('.')[0]} ({first_line(error)})"
    else:
        return first
    raise InputError(f"{what} needs {missing}: pip install 'blockdiff[{extra}]'")
