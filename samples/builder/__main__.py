"""`python -m builder --out altsight_samples/data`: download the packages, build every set, print what was made."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import clipart, documents, emoji, shards
from .packages import Package, debian, npm
from .split import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m builder", description="Build the embedded sample data.")
    parser.add_argument("--out", type=Path, required=True, help="the data folder to write into")
    parser.add_argument("--cache", type=Path, default=Path("build/packages"), help="where downloaded packages are kept")
    args = parser.parse_args()

    fonts = debian("fonts-dejavu-core", args.cache)
    openclipart = debian("openclipart-svg", args.cache)
    vendors = [npm(f"@iconify-json/{name}", args.cache) for name in ("openmoji", "noto", "fluent-emoji-flat")]
    names = npm("emojibase-data", args.cache)
    gallery, handbook = debian("python-skimage-doc", args.cache), debian("debian-handbook", args.cache)

    samples, splits, group = clipart.build(openclipart, fonts)
    shards.write(samples, splits, args.out / "clipart", quality=50)
    report("clipart", splits, group)

    samples, splits, group = emoji.build(vendors, names, fonts)
    shards.write(samples, splits, args.out / "emoji", quality=50)
    report("emoji", splits, group)

    splits, group = documents.build(gallery, handbook, args.out / "documents")
    report("documents", splits, group)

    record_versions([openclipart, fonts, *vendors, names, gallery, handbook], args.out / "versions.json")


def report(name: str, splits: Sequence[str], group: Sequence[int]) -> None:
    """Print the counts of one set and its groups."""
    counts, sizes = Counter(splits), Counter(group)
    parts = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    shared = sum(size > 1 for size in sizes.values())
    print(f"{name}: {parts}; {len(sizes)} groups, {shared} of more than one, the largest {max(sizes.values())}")


def record_versions(packages: Sequence[Package], path: Path) -> None:
    """Write the version of every package that was read."""
    path.write_text(
        shards.compact_json({package.origin: package.version for package in packages}) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
