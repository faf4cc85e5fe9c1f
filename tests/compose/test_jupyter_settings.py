"""JupyterLab in docker compose has the settings of `connlab start`: one that is added there is wanted here too."""

from __future__ import annotations

import re

from compose_stack import CHECKOUT

OF_START = (CHECKOUT / "src" / "connlab" / "jupyter.py").read_text()
OF_COMPOSE = (CHECKOUT / "deploy" / "jupyter" / "connlab-jupyter").read_text()
FROM_A_FILE = {"IdentityProvider.token"}
"""The container's token is in the file that JUPYTER_TOKEN_FILE names."""
CONTAINERS_OWN = {"ServerApp.allow_remote_access", "Application.log_level"}
"""What `connlab start` gets by listening on the loopback alone, and by sending the log to a file."""


def test_the_same_settings_are_made() -> None:
    of_start = set(re.findall(r'"([A-Z]\w+\.\w+)": ', OF_START))
    of_compose = set(re.findall(r"--([A-Z]\w+\.\w+)=", OF_COMPOSE))
    assert len(of_start) > 10
    assert of_start - FROM_A_FILE == of_compose - CONTAINERS_OWN


def test_the_same_folders_are_moved() -> None:
    names = r"\b((?:JUPYTER|JUPYTERLAB|IPYTHON|JP)_?[A-Z_]*(?:DIR|PATH))="
    of_start = set(re.findall(names, OF_START))
    assert len(of_start) > 5
    assert of_start == set(re.findall(names, OF_COMPOSE))
