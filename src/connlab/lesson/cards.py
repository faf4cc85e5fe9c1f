"""How a lesson's outputs look: HTML for front ends, text for everything else.

What survives where was measured with JupyterLab 4.6. In an output that is not trusted (a notebook that somebody else
has run) styles, scripts and the names of inputs are removed and inputs are disabled; what is left are text, `details`
and inline styles. So every card can be read without its style, what must stay hidden is hidden inline, and answers are
also in a `details`. No card has a script: all works after a reload, without a kernel, and in an exported page.
"""

from __future__ import annotations

import html
import re
import secrets
from functools import cache
from importlib import resources

KEYS = 'data-lm-suppress-shortcuts="true"'
"""For everything that takes the keyboard: in JupyterLab, D D on a radio button would delete the cell."""
HIDDEN = 'style="display:none"'
"""For what the style shows: it stays hidden where there is no style."""


class Card:
    """An output with a form in HTML and a form in plain text."""

    def __init__(self, markup: str, text: str) -> None:
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


def show(kind: str, body: str, text: str, *, style: str = "") -> None:
    """Show a card; without a notebook, print its text. ``style`` comes on top of what all cards have."""
    from IPython.display import display

    markup = f'<style>{common_style()}{style}</style>\n<div class="connlab-card connlab-{kind}">\n{body}\n</div>'
    display(Card(markup, text))  # type: ignore[no-untyped-call]


@cache
def common_style() -> str:
    """The style that all cards have."""
    return resources.files("connlab.lesson").joinpath("cards.css").read_text(encoding="utf-8")


def inline(text: str) -> str:
    """Text as HTML; what stands between backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def token() -> str:
    """A name that no other card of the page has."""
    return f"c{secrets.token_hex(4)}"


def number(value: float | int | str) -> str:
    """A measured number as one reads it: three to four digits that count. A text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
