"""The one exception type whose message is meant for the user."""

import re

# What a terminal takes for orders. A model may say anything, and a file may be called anything.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """Something the user can mend; the message is one clear sentence. Commands print it and exit with 1."""


def printable(text: str) -> str:
    """The text without the characters that steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
