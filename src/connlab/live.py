"""The live timeline: one cell that shows what happens in pool, PgBouncer and PostgreSQL while it happens."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from connlab.errors import SettingError
from connlab.recorder import Recorder

if TYPE_CHECKING:
    import ipywidgets  # type: ignore[import-untyped]

WINDOWS = (10, 30, 60)
PERIOD = 0.25
UNSEEN = 20.0
"""Seconds after which nobody will come to see it: the cell ran without a front end that shows widgets."""
STATIC = "CONNLAB_STATIC"


def watch(*sources: object, window: float = 30, minutes: float = 10, **named: object) -> Watch:
    """Show a live timeline of these servers and pools below the cell; takes what ``Recorder`` takes.

    The cell ends at once and the figure goes on, four times a second, while other cells run. It stops by itself: when
    the output is cleared or its cell deleted, after ``minutes``, with the kernel, or by its button or ``stop()``.
    ``window``: the seconds shown, 10, 30 or 60; a control changes it, another one pauses.

    Where nobody watches it is one static frame: with ``CONNLAB_STATIC=1`` in the environment, under pytest
    (``PYTEST_CURRENT_TEST``, which nbval's kernels inherit), and outside Jupyter. A front end that shows no
    widgets ends it after some seconds.

    Raises SettingError for another window, and as ``Recorder`` does.

    Example:
        ``live = watch(pg, bouncer, app=pool)``; ``live.mark("leak starts")``
    """
    if window not in WINDOWS:
        raise SettingError(f"window takes {', '.join(map(str, WINDOWS))} (seconds), not {window!r}")
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= 24 * 60:
        raise SettingError(f"minutes takes a number above 0, a day at most, not {minutes!r}")
    live = Watch(Recorder(*sources, **named), float(window), minutes * 60)  # type: ignore[arg-type]
    if is_static():
        live._show_static()
    else:
        live._show()
    return live


def is_static() -> bool:
    """Whether ``watch`` shows one frame instead of a live figure, see there."""
    if os.environ.get(STATIC, "") not in ("", "0") or "PYTEST_CURRENT_TEST" in os.environ:
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is None


class Watch:
    """A live timeline that runs, or has stopped; ``watch`` makes it. ``rec`` is its recording."""

    def __init__(self, rec: Recorder, window: float, lasts: float) -> None:
        self.rec = rec
        self._window, self._lasts = window, lasts
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connlab-live", daemon=True)
        self._html: ipywidgets.HTML | None = None
        self._status: ipywidgets.HTML | None = None
        self._paused = self._seen = False
        self._began = 0.0

    @property
    def running(self) -> bool:
        """Whether it samples and draws."""
        return self._thread.is_alive()

    def mark(self, text: str) -> None:
        """Write down that something happens now; the figure shows it."""
        self.rec.mark(text)

    def stop(self) -> None:
        """End it; the last frame stays. Twice is no error."""
        self._ending.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5)

    def __repr__(self) -> str:
        return f"<live timeline, {'running' if self.running else 'stopped'}>"

    def _ipython_display_(self) -> None:
        """Nothing: ``watch`` has shown it."""

    # --- showing --------------------------------------------------------------------------------------------

    def _show(self) -> None:
        from IPython.display import display

        self._html, self._status, box = self._widgets()
        self._began = time.monotonic()
        self.rec.start()
        self._draw()
        display(box)  # type: ignore[no-untyped-call]
        self._thread.start()

    def _show_static(self) -> None:
        from connlab.figures.live import drawing

        with self.rec:
            pass
        if "IPython" in sys.modules:
            from IPython.display import HTML, display

            display(HTML(drawing(self.rec, self._window)))  # type: ignore[no-untyped-call]

    def _widgets(self) -> tuple[ipywidgets.HTML, ipywidgets.HTML, ipywidgets.VBox]:
        import ipywidgets as widgets

        picture, status = widgets.HTML(), widgets.HTML("live")
        # Counts the views that front ends have open: https://github.com/jupyter-widgets/ipywidgets/pull/1232
        picture._view_count = 0
        picture.observe(self._on_views, "_view_count")
        pause = widgets.ToggleButton(value=False, description="pause", tooltip="hold the picture; recording goes on")
        pause.observe(self._on_pause, "value")
        shown = widgets.ToggleButtons(options=[(f"{each} s", each) for each in WINDOWS], value=int(self._window))
        shown.style.button_width = "4em"
        shown.observe(self._on_window, "value")
        stop = widgets.Button(description="stop", tooltip="end the recording")
        stop.on_click(lambda _: self._ending.set())
        controls = widgets.HBox([pause, shown, stop, status])
        return picture, status, widgets.VBox([controls, picture])

    def _on_views(self, change: Any) -> None:
        if change["new"]:
            self._seen = True
        elif self._seen:
            self._ending.set()

    def _on_pause(self, change: Any) -> None:
        self._paused = change["new"]

    def _on_window(self, change: Any) -> None:
        self._window = float(change["new"])

    # --- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ending.wait(PERIOD) and not self._is_over():
                if not self._paused:
                    self._draw()
        finally:
            self.rec.stop()
            if self._status is not None:
                self._status.value = "stopped"

    def _draw(self) -> None:
        from connlab.figures.live import drawing

        assert self._html is not None
        self._html.value = drawing(self.rec, self._window)

    def _is_over(self) -> bool:
        lasted = time.monotonic() - self._began
        return lasted > self._lasts or (not self._seen and lasted > UNSEEN)
