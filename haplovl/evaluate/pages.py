"""What the HTML pages of the evaluation share: templates, embedded pictures, one style sheet."""

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

THUMBNAIL_SIDE = 400
"""Larger pictures are shrunk for the page."""
PIXELATED_BELOW = 128
"""Smaller pictures are shown enlarged, with their pixels as they are."""


def page_templates() -> Environment:
    """The templates beside this file."""
    # Questions, answers and predictions are text of unknown origin: everything is escaped.
    environment = Environment(
        loader=PackageLoader("haplovl.evaluate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["share"] = lambda value: f"{100 * value:.1f}%"
    return environment


def embedded_picture(image: Image.Image) -> dict[str, Any]:
    """A picture as a data: URI (shrunk if large) and whether to show it enlarged with hard pixels."""
    small = max(image.size) < PIXELATED_BELOW
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if small else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({} if small else {"quality": 85}))
    return {"uri": data_uri(buffer.getvalue(), f"image/{kind}"), "pixelated": small}


def data_uri(content: bytes, mime: str) -> str:
    """A file's content as an address that needs no file."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
