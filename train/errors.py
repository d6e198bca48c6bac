"""Errors that a user of the command line can mend."""


class UserError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to change."""
