"""Credentials, and how they are kept out of whatever is written or shown."""

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(r"(^|_)(password|secret|token|api_?key|access_?key)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|(ACCESS|ACCOUNT|STORAGE)_?KEY|CONNECTION_STRING)", re.IGNORECASE
)
_SECRET_LENGTH = 8
"""Shorter values of such variables are words like `true`, not secrets."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:token|sig|key|credential|password|secret)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """A copy of a text, or of a configuration with texts in it, in which credentials are hidden.

    Hidden are texts under names such as `token` or `api_key`, credentials inside addresses, and whatever the
    environment holds in a variable with such a name.
    """
    known = [text for name, text in os.environ.items() if _SECRET_VARIABLE.search(name) and len(text) >= _SECRET_LENGTH]
    return _hidden(value, sorted(known, key=len, reverse=True))


def _hidden(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(entry, str) and _SECRET_NAME.search(str(name)) else _hidden(entry, known)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_hidden(entry, known) for entry in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, HIDDEN)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(f"{HIDDEN}@", value))


def with_credentials(value: Any, name: str = "") -> Iterator[str]:
    """The names of texts in a configuration that hold credentials inside an address, such as `teachers.vision.path`."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from with_credentials(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and (_IN_ADDRESS.search(value) or _IN_QUERY.search(value)):
        yield name
