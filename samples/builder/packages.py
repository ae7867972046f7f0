"""Download and unpack the public packages that the samples are drawn from."""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

NPM_VERSIONS = {
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emojibase-data": "17.0.0",
}


@dataclass(frozen=True)
class Package:
    """An unpacked package: where its files are, and how a sample names it as its source."""

    root: Path
    version: str
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} {self.version}"


def debian(name: str, cache: Path) -> Package:
    """Fetch a Debian package with `apt-get download` (run `apt-get update` once before) and unpack it."""
    folder = cache / "debian" / name
    root = folder / "files"
    if not root.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
        subprocess.run(["dpkg", "-x", _only(folder, "*.deb"), "files"], cwd=folder, check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", _only(folder, "*.deb"), "Version"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()
    return Package(root, version, f"debian:{name}")


def npm(name: str, cache: Path) -> Package:
    """Fetch the pinned version of an npm package with `npm pack` and unpack it."""
    version = NPM_VERSIONS[name]
    folder = cache / "npm" / name
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        with tarfile.open(folder / _only(folder, "*.tgz")) as archive:
            archive.extractall(folder, filter="data")
    return Package(folder / "package", version, f"npm:{name}")


def _only(folder: Path, pattern: str) -> str:
    """The name of the one file in `folder` that matches."""
    (found,) = folder.glob(pattern)
    return found.name
