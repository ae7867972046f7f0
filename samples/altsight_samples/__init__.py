"""Small image-text data sets to try Altsight on: clip art, emoji and interleaved documents."""

from pathlib import Path

ROOT = Path(__file__).parent / "data"
NAMES = ("clipart", "emoji")
SPLITS = ("train", "val", "test")


def path(name: str, split: str) -> Path:
    """The folder with the WebDataset tar shards of one split of `clipart` or `emoji`."""
    if name not in NAMES:
        raise ValueError(f"There is no sample set {name!r}: choose one of {', '.join(NAMES)}.")
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return ROOT / name / split


def documents() -> Path:
    """The folder with the interleaved documents: documents.jsonl and its images/."""
    return ROOT / "documents"
