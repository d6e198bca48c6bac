"""The one exception class for mistakes of the user."""


class UserError(ValueError):
    """A mistake of the user, shown as one line.

    The message names the thing (file, line number, speaker, responder, key) and what was expected.
    """
