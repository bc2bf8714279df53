"""The one exception type whose message is meant for the user."""


class UserError(Exception):
    """Something the user can mend; the message is one clear sentence. Commands print it and exit with 1."""
