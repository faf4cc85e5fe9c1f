"""Jupyter's checkpoints in the state directory, not beside the notebooks.

Imported by Jupyter, which is told the class's name, and by nothing else.
"""

from __future__ import annotations

from pathlib import Path

from jupyter_server.services.contents.filecheckpoints import AsyncFileCheckpoints


class Checkpoints(AsyncFileCheckpoints):
    """Checkpoints below ``root_dir``, in folders laid out as the notebooks' are."""

    def checkpoint_path(self, checkpoint_id: str, path: str) -> str:
        """Where a notebook's checkpoint is; the parent would fall back to /tmp where the folder is missing."""
        (Path(self.root_dir) / path.strip("/")).parent.mkdir(parents=True, exist_ok=True)
        return str(super().checkpoint_path(checkpoint_id, path))  # type: ignore[no-untyped-call]
