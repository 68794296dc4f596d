"""The one error a user should ever read: what is wrong and how to mend it, in one line."""


class InputError(ValueError):
    """Bad input from outside (an option, a file, a checkpoint).

    Library callers catch it as a `ValueError`; the command line prints its message as one line
    and exits with code 2.
    """
