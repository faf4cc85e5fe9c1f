"""Unpack a program from this system's Debian packages into a folder of ours.

Nothing is installed, no service is started and no root right is needed: apt-get only downloads,
``dpkg-deb -x`` only unpacks, and everything that apt-get writes goes to a scratch folder.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from connlab.errors import ConnlabError

TOOLS = ("apt-get", "dpkg-deb", "dpkg-query", "ldd")
TREE = "root"
"""Where under its folder a package's files are."""
DEADLINE = 300.0
"""Seconds after which apt-get is given up."""

# `#clear` first: the machine's own hooks (PackageKit's, Docker's clean-up) would otherwise run at the
# end of an update, change the machine outside our folder, and desktop indexes would be fetched too.
_CONFIGURATION = """\
#clear APT::Update;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
  MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
  flatMetaKey "Packages";
  ShortDescription "Packages";
  Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
  flatDescription "$(RELEASE) Packages";
  Optional "0";
}};
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Dir::Cache "{scratch}/cache";
"""
_PRIVATE_LISTS = 'Dir::State::lists "{scratch}/lists";\n'


class NotUnpacked(ConnlabError):
    """A package could not be unpacked; the message says why in one line."""


def unavailable() -> str | None:
    """Why packages cannot be unpacked here, in one line; None when they can.

    Example:
        >>> unavailable()   # on macOS
        'apt-get, dpkg-deb, dpkg-query, ldd not found: this is neither Debian nor Ubuntu'
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: this is neither Debian nor Ubuntu"
    return None


def unpack(package: str, program: str, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack ``package``, and the libraries that its ``program`` lacks here, under ``folder``.

    ``program`` is the path inside the package ("usr/sbin/pgbouncer"). Afterwards ``folder / TREE`` holds
    their files, and nothing else is left in ``folder``. Raises NotUnpacked. Example::

        unpack("pgbouncer", "usr/sbin/pgbouncer", Path("/tmp/p"), print)
    """
    reason = unavailable()
    if reason:
        raise NotUnpacked(reason)
    tree, scratch = folder / TREE, folder / "scratch"
    tree.mkdir(parents=True)
    apt = _Apt(scratch, say)
    packages = apt.download([package])
    _extract(packages, tree)
    _add_libraries(apt, tree / program, packages, tree)
    shutil.rmtree(scratch)


def environment(folder: Path) -> dict[str, str]:
    """What must be set to run a program unpacked under ``folder``: LD_LIBRARY_PATH, or nothing."""
    tree = folder / TREE
    found = {str(library.parent) for top in ("lib", "usr/lib") for library in (tree / top).glob("*/*.so*")}
    if not found:
        return {}
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join([*sorted(found), *([inherited] if inherited else [])])}


class _Apt:
    """Downloads packages with the machine's package lists or, when those do not do, with fresh private ones."""

    def __init__(self, scratch: Path, say: Callable[[str], None]) -> None:
        self._scratch, self._say = scratch, say
        self._fresh = False
        self._configuration = scratch / "apt.conf"
        self._debs = scratch / "debs"
        for folder in ("cache/archives/partial", "lists/partial", "debs"):
            (scratch / folder).mkdir(parents=True)
        self._configuration.write_text(_CONFIGURATION.format(scratch=scratch))
        _give_to_apts_user(self._debs)

    def download(self, packages: list[str]) -> list[Path]:
        """The package files. A fresh container has no lists, and old lists name files that are gone."""
        if not self._fresh:
            with suppress(NotUnpacked):
                return self._download(packages)
            self._update()
        return self._download(packages)

    def _download(self, packages: list[str]) -> list[Path]:
        megabytes = _total_size(self._run("download", "--print-uris", *packages)) / 1e6
        self._say(f"Fetching {', '.join(packages)} from this system's packages ({megabytes:.1f} MB)")
        before = set(self._debs.iterdir())
        self._run("download", *packages)
        return sorted(set(self._debs.iterdir()) - before)

    def _update(self) -> None:
        self._say("Reading this system's package index (some 10 MB, not kept)")
        with self._configuration.open("a") as configuration:
            configuration.write(_PRIVATE_LISTS.format(scratch=self._scratch))
        self._fresh = True
        self._run("update")

    def _run(self, *words: str) -> str:
        # -c is read after the machine's configuration; the variable APT_CONFIG would be read before it.
        return _output(["apt-get", "-q", f"-c={self._configuration}", *words], cwd=self._debs)


def _give_to_apts_user(folder: Path) -> None:
    """As root, apt-get drops to the user _apt for downloading, which must be able to write there."""
    if os.geteuid() != 0:
        return
    try:
        os.chown(folder, pwd.getpwnam("_apt").pw_uid, -1)
    except KeyError:  # such an apt-get does not drop root
        return


def _total_size(uris: str) -> int:
    """Bytes in all, from lines of ``'address' name size hash``."""
    return sum(int(size) for size in re.findall(r"^'[^']*' \S+ (\d+)", uris, re.MULTILINE))


def _extract(packages: Iterable[Path], tree: Path) -> None:
    for package in packages:
        _output(["dpkg-deb", "-x", str(package), str(tree)])


def _add_libraries(apt: _Apt, program: Path, packages: list[Path], tree: Path) -> None:
    """Add the packages of shared libraries until ``program`` finds all that it needs."""
    asked: set[str] = set()
    while lacking := _lacking(program, environment(tree.parent)):
        names = sorted(_libraries_not_installed(packages) - asked)
        if not names:
            raise NotUnpacked(f"{', '.join(lacking)} not found, and no package that it depends on has it")
        asked.update(names)
        packages = apt.download(names)
        _extract(packages, tree)


def _lacking(program: Path, extra: Mapping[str, str]) -> list[str]:
    """The shared libraries (or symbol versions in them) that the loader does not find for ``program``."""
    lines = _output(["ldd", str(program)], extra=extra).splitlines()
    return [line.split("=>")[0].strip() for line in lines if "not found" in line]


def _libraries_not_installed(packages: Iterable[Path]) -> set[str]:
    """Of the packages that ``packages`` depend on: the libraries, each in its first alternative, not installed."""
    fields = [_output(["dpkg-deb", "-f", str(package), "Depends"]) for package in packages]
    groups = [group for field in fields for group in field.split(",")]
    alternatives = [re.findall(r"(?:^|\|)\s*([a-z0-9][a-z0-9+.-]+)", group) for group in groups]
    libraries = [names for names in alternatives if names and names[0].startswith("lib")]
    return {names[0] for names in libraries if not any(map(_installed, names))}


def _installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f=${db:Status-Status} ", package]
    done = subprocess.run(query, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return "installed" in done.stdout.split()


def _output(command: list[str], *, cwd: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
    """What ``command`` prints; raises NotUnpacked with the reason that it gives."""
    environment = {**os.environ, "LC_ALL": "C", **(extra or {})}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
    except subprocess.TimeoutExpired as late:
        raise NotUnpacked(f"{command[0]} was still not done after {DEADLINE:.0f} s") from late
    except OSError as problem:
        raise NotUnpacked(f"{command[0]} does not start: {problem.strerror}") from problem
    if done.returncode:
        raise NotUnpacked(f"{command[0]} failed: {_reason(done.stderr or done.stdout)}")
    return done.stdout


def _reason(text: str) -> str:
    """The lines with which apt-get reports errors, as one; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")] or lines[-1:]
    return " ".join(errors) or "it said nothing"
