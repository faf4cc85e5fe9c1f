"""A finished figure: shows itself in any notebook, with what to look at and a text for who cannot see it."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from connlab.errors import SettingError
from connlab.figures.style import house_style


class Picture:
    """What the functions of ``connlab.figures`` return.

    ``alt``: the alternative text, from the data. ``look``: the sentence that says what to look at. ``figure``: the
    matplotlib figure, for whoever wants to add to it before it is shown.

    Example:
        ``picture = timeline(rec)``, then ``picture.alt``, ``picture.save("leak.png")``
    """

    def __init__(self, figure: Figure, *, alt: str, look: str = "") -> None:
        self.figure, self.alt, self.look = figure, alt, look

    def svg(self) -> str:
        """The figure as SVG text, with its alternative text as title."""
        text = io.StringIO()
        with house_style():
            metadata: dict[str, Any] = {"Title": self.alt, "Date": None}
            self.figure.savefig(text, format="svg", metadata=metadata)
        return text.getvalue()

    def png(self, *, dots_per_inch: int = 110) -> bytes:
        """The figure as PNG."""
        content = io.BytesIO()
        with house_style():
            self.figure.savefig(content, format="png", dpi=dots_per_inch, metadata={"Description": self.alt})
        return content.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write it to ``path``, whose end (.svg, .png) says as what; raises SettingError for another."""
        file = Path(path)
        if file.suffix == ".svg":
            file.write_text(self.svg(), encoding="utf-8")
        elif file.suffix == ".png":
            file.write_bytes(self.png())
        else:
            raise SettingError(f"a picture is saved as .svg or .png, not as {file.suffix or 'a name without an end'!r}")
        return file

    def __repr__(self) -> str:
        return "\n".join(filter(None, [self.alt, self.look]))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        image = base64.b64encode(self.svg().encode()).decode()
        source = f"data:image/svg+xml;base64,{image}"
        caption = f"<figcaption><em>{html.escape(self.look)}</em></figcaption>" if self.look else ""
        return {
            "text/plain": repr(self),
            "text/html": '<figure style="margin:0">'
            f'<img alt="{html.escape(self.alt)}" src="{source}" style="max-width:100%;height:auto">{caption}</figure>',
        }
