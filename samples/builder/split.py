"""Near-duplicate groups, and splits that never cut a group in two."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test")
# Thresholds chosen by looking at pairs on either side; see samples/README.md.
SAME_DRAWING = 0.88
SAME_SHADES = 0.97
# The spread of a thumbnail's pixels, of 255, below which nothing can be seen.
PLAIN = 8.0
_SIDE = 32
_BLOCK = 512


def content_hash(picture: Image.Image) -> str:
    """A hash of the pixels and the size of a picture: the same drawing under two names has one hash."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def near_duplicates(pictures: Sequence[Image.Image], same_drawing: float = SAME_DRAWING) -> list[tuple[int, int]]:
    """Pairs of pictures that show the same drawing, also in other colours.

    A pair is linked when its outlines agree (cosine of the colour-gradient maps at least `same_drawing`) or when its
    shades do, as they are or inverted (correlation of the grey thumbnails at least SAME_SHADES in size).
    """
    outlines = np.stack([_outline(picture) for picture in pictures])
    shades = np.stack([_shades(picture) for picture in pictures])
    pairs = []
    for start in range(0, len(pictures), _BLOCK):
        block = slice(start, start + _BLOCK)
        agree = (outlines[block] @ outlines.T >= same_drawing) | (np.abs(shades[block] @ shades.T) >= SAME_SHADES)
        pairs += [(start + int(i), int(j)) for i, j in np.argwhere(agree) if start + i < j]
    return pairs


def is_plain(picture: Image.Image) -> bool:
    """Whether next to nothing can be seen: one flat colour, or lines too thin to survive at thumbnail size."""
    return bool(_thumbnail(picture).std((0, 1)).max() < PLAIN)


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Union-find: for each of `count` items the smallest item it is linked to by a chain of `pairs`."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(item) for item in range(count)]


def split_by_hash(names: Sequence[str], group: Sequence[int], val: float, test: float) -> list[str]:
    """A split for each item, decided by the smallest name (a content hash) of its group."""
    leader: dict[int, str] = {}
    for name, number in zip(names, group, strict=True):
        leader[number] = min(name, leader.get(number, name))
    return [_choose(leader[number], val, test) for number in group]


def split_by_label(
    names: Sequence[str], group: Sequence[int], labels: Sequence[str], val: float, test: float
) -> list[str]:
    """A split for each item so that each label keeps the shares, and none is in val or test that is not in train.

    Groups are placed one by one, large ones first, then by their smallest name; each goes where its label lacks most.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for item, number in enumerate(group):
        members[number].append(item)
    shares = {"train": 1.0 - val - test, "val": val, "test": test}
    placed: dict[str, Counter[str]] = defaultdict(Counter)
    split = [""] * len(names)
    for items in sorted(members.values(), key=lambda items: (-len(items), min(names[i] for i in items))):
        found = Counter(labels[item] for item in items)
        main = max(found, key=lambda label: (found[label], label))
        total = placed[main].total() + len(items)
        choice = max(SPLITS, key=lambda name: shares[name] * total - placed[main][name])
        if any(not placed[label]["train"] for label in found):
            choice = "train"
        for item in items:
            split[item] = choice
            placed[labels[item]][choice] += 1
    return split


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """The picture stretched to a small square, as float32."""
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)


def _shades(picture: Image.Image) -> np.ndarray:
    """The grey thumbnail less its mean, as a unit vector."""
    grey = _thumbnail(picture).mean(-1).ravel()
    return _unit(grey - grey.mean())


def _outline(picture: Image.Image) -> np.ndarray:
    """The strength of the gradient in x and in y, the strongest of the three colours, as a unit vector."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    framed = np.pad(_thumbnail(square), ((1, 1), (1, 1), (0, 0)), constant_values=255.0)
    across = np.abs(framed[1:-1, 2:] - framed[1:-1, :-2]).max(-1)
    down = np.abs(framed[2:, 1:-1] - framed[:-2, 1:-1]).max(-1)
    return _unit(np.concatenate([across.ravel(), down.ravel()]))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def _choose(name: str, val: float, test: float) -> str:
    """Map a hex hash to a split: its first 32 bits are a fraction in [0, 1)."""
    fraction = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    if fraction < test:
        return "test"
    return "val" if fraction < test + val else "train"
