"""Which runtime servers run in."""

from __future__ import annotations

import os

from connlab.errors import ConnlabError
from connlab.runtime import Runtime
from connlab.runtime.local import LocalRuntime

VARIABLE = "CONNLAB_BACKEND"


def choose(backend: str = "auto") -> Runtime:
    """The runtime for ``backend``; "auto" asks the variable CONNLAB_BACKEND, and without it means local."""
    named = os.environ.get(VARIABLE, "auto") if backend == "auto" else backend
    if named in ("auto", "local"):
        return LocalRuntime()
    raise ConnlabError(f"there is no backend {named!r}: write 'auto' or 'local' (argument backend or {VARIABLE})")
