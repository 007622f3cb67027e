"""Parts of the page as HTML. Whatever is not markup of these functions is escaped."""

import base64
import io
from collections.abc import Mapping
from html import escape

from matplotlib.figure import Figure

# Of pictures, dots in an inch: shown at 96, sharp on a screen of twice as many.
RESOLUTION, SHOWN = 160, 96


def message(text: str) -> str:
    """What is wrong with the input, and how to mend it."""
    return f'<p class="xlfa-message" role="alert" dir="auto">{escape(text)}</p>'


def facts(values: Mapping[str, str]) -> str:
    """Names and values."""
    rows = (f'<div><dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd></div>' for name, value in values.items())
    return f'<dl class="xlfa-facts">{"".join(rows)}</dl>'


def passage(text: str, start: int, end: int) -> str:
    """A text with the characters start:end marked; its direction is that of its first letter."""
    before, marked, after = (escape(part) for part in (text[:start], text[start:end], text[end:]))
    return f'<div class="xlfa-passage" dir="auto">{before}<mark>{marked}</mark>{after}</div>'


def picture(figure: Figure, description: str) -> str:
    """A figure as an image in its natural size, or as wide as the page; the description is read aloud."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=RESOLUTION)
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    width = round(SHOWN * figure.get_figwidth())
    return f'<img class="xlfa-picture" width="{width}" src="{source}" alt="{escape(description)}">'
