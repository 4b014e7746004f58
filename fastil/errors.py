"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: bad key, missing path, damaged file.

    The message is one line that names the fix. The command line prints it without a traceback and exits with 2.
    """
