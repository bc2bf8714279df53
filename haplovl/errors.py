"""The one exception type whose message is meant for the user."""

import errno
import re

# What a terminal takes for orders. A model may say anything, and a file may be called anything.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """Something the user can mend; the message is one clear sentence. Commands print it and exit with 1."""


class TemporaryError(UserError):
    """What may be over in a minute, such as a server that does not answer. Commands exit with EXIT_AGAIN."""


EXIT_AGAIN = 75
"""Exit status (sysexits' EX_TEMPFAIL) after which the flow tries a stage again by itself."""
_TEMPORARY = {
    errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE,
}  # fmt: skip


def is_temporary(error: OSError) -> bool:
    """Whether the operating system may well serve the same call in a minute; a full disk or no permission will not."""
    return error.errno in _TEMPORARY or isinstance(error, TimeoutError)


def printable(text: str) -> str:
    """The text without the characters that steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
