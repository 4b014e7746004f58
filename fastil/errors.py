"""The one exception that means "the user can fix this"."""

from fastil.text import one_line


class UserError(ValueError):
    """A mistake in what the user gave: bad key, missing path, damaged file.

    The message is one line that names the fix, without control characters, which names of files can hold. The command
    line prints it without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
