"""Interleaved documents: a record of MMC4 or OBELICS -> texts with the images that belong to them -> a drawn document.

MMC4 (Zhu et al. 2023, arXiv 2304.06939) assigns every image to the sentence that it is most similar to; OBELICS
(Laurençon et al. 2023, arXiv 2306.16527) keeps the place that the image has on its page. Both are drawn from by the
rules of LCL (Yang et al. 2024, arXiv 2406.07543, interleaved sequence construction; specification LCL 2.4).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from altsight.core.errors import UserError
from altsight.core.rng import Key


@dataclass(frozen=True, slots=True)
class Placed:
    """An image that belongs to a place in a text.

    names: what the image may be stored under, in order of preference; empty only where `data` is given.
    data: the encoded image where the record itself holds it.
    sentence: index of the text that the image belongs to; that text is not empty.
    similarity: how well image and text agree (cosine of CLIP features); None where nobody measured it.
    alt: the image's alt text; may be empty.
    before: whether the page shows the image before (True) or after (False) its text; None where the image was only
        matched to the text, and may stand on either side.
    """

    names: tuple[str, ...]
    data: bytes | None
    sentence: int
    similarity: float | None
    alt: str
    before: bool | None = None


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Texts and the images that belong to them, both in reading order. A text may be empty, but then has no image."""

    texts: tuple[str, ...]
    images: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a document is drawn from a record; the defaults are those of LCL (specification LCL 2.4).

    min_similarity: images that agree less with their text are left out; images without a similarity stay.
    max_images: only the first so many images of a document are used.
    before: the chance that an image which was matched to a sentence stands before it, not after it.
    """

    min_similarity: float = 0.24
    max_images: int = 6
    before: float = 0.5

    def __post_init__(self) -> None:
        if self.max_images < 1:
            raise UserError(f"documents of at most {self.max_images} images hold none: use --max-images 1 or more.")


def read_document(fields: Mapping[str, Any]) -> Interleaved | None:
    """Read a record in the layout of MMC4 (`text_list`, `image_info`) or OBELICS (`images`, `texts`).

    Anything malformed in it (wrong types, an index outside of the texts, a similarity that is no number) costs only
    the image that it concerns. An image in OBELICS belongs to the text that follows it, one at the end to the last.

    Returns:
        The document, possibly without any image; None where the record has neither layout.
    """
    if isinstance(fields.get("text_list"), list) and isinstance(fields.get("image_info"), list):
        return _read_mmc4(fields["text_list"], fields["image_info"])
    if isinstance(fields.get("images"), list) and isinstance(fields.get("texts"), list):
        return _read_obelics(fields["images"], fields["texts"], _list(fields.get("metadata")))
    return None


def sample(document: Interleaved, sampling: Sampling, at: Key) -> list[str | Placed]:
    """Draw the parts of a document in reading order: every text, and the images that were chosen for it.

    LCL's steps: leave out images of low similarity, keep one image at random where several share a place, keep the
    first `max_images`, put each before or after its sentence at random. For MMC4 a place is a sentence. LCL's rules
    for OBELICS are not published; here a place is a gap between texts, and images stay where the page shows them.
    Of a gallery that leaves one image, since the text before it does not tell its images apart.

    Returns:
        The parts, none of them empty; no parts where no image is left, so that another document has to be drawn.
    """
    chosen = _one_a_place(_similar(document, sampling), at)[: sampling.max_images]
    if not chosen:
        return []
    sides = (at.child("side").generator().random(len(chosen)) < sampling.before).tolist()
    places = {
        (image.sentence, side if image.before is None else image.before): image
        for image, side in zip(chosen, sides, strict=True)
    }
    parts: list[str | Placed | None] = []
    for i, text in enumerate(document.texts):
        parts += [places.get((i, True)), text, places.get((i, False))]
    return [part for part in parts if part]


def pair(document: Interleaved, sampling: Sampling, at: Key) -> tuple[str, Placed] | None:
    """Draw one image that is similar enough, with its sentence: what LCL calls MMC4-Pair, for methods that need pairs.

    Returns:
        The sentence (never empty) and its image; None where no image is left.
    """
    images = _similar(document, sampling)
    if not images:
        return None
    image = images[at.child("pair").generator().integers(len(images))]
    return document.texts[image.sentence], image


def _similar(document: Interleaved, sampling: Sampling) -> list[Placed]:
    return [i for i in document.images if i.similarity is None or i.similarity >= sampling.min_similarity]


def _one_a_place(images: list[Placed], at: Key) -> list[Placed]:
    places: dict[tuple[int, bool | None], list[Placed]] = {}
    for image in images:
        places.setdefault((image.sentence, image.before), []).append(image)
    draw = at.child("image").generator()
    return [rivals[draw.integers(len(rivals))] for rivals in places.values()]


def _read_mmc4(text_list: list[Any], image_info: list[Any]) -> Interleaved:
    # Sentences keep their number, since the images refer to it: one that is no text becomes an empty one.
    texts = tuple(map(_string, text_list))
    images = []
    for info in image_info:
        if not isinstance(info, Mapping):
            continue
        sentence, similarity = info.get("matched_text_index"), info.get("matched_sim")
        names = _names(info.get("image_name"), info.get("raw_url"))
        usable = names and (similarity is None or _is_number(similarity))
        if usable and type(sentence) is int and 0 <= sentence < len(texts) and texts[sentence]:
            images.append(Placed(names, None, sentence, similarity, _string(info.get("alt"))))
    return Interleaved(texts, tuple(sorted(images, key=lambda image: image.sentence)))


def _read_obelics(images: list[Any], texts: list[Any], metadata: list[Any]) -> Interleaved:
    found: list[Placed] = []
    kept: list[str] = []
    for image, text, about in zip_longest(images, texts, metadata):
        about = about if isinstance(about, Mapping) else {}
        path, data = _stored(image)
        names = _names(path, about.get("src"))
        if image is not None and (names or data):
            found.append(Placed(names, data, len(kept), None, _string(about.get("alt_text")), before=True))
        if text := _string(text):
            kept.append(text)
    if not kept:
        return Interleaved((), ())
    last = len(kept) - 1
    placed = (i if i.sentence <= last else replace(i, sentence=last, before=False) for i in found)
    return Interleaved(tuple(kept), tuple(placed))


def _stored(image: Any) -> tuple[Any, bytes | None]:
    """Return the name and the bytes in an element of `images`: a URL, encoded bytes, or a {"bytes", "path"} struct."""
    if isinstance(image, Mapping):
        path, data = image.get("path"), image.get("bytes")
    else:
        path, data = image, image
    return path, data if isinstance(data, bytes) and data else None


def _names(*candidates: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in map(_string, candidates) if name))


def _string(value: Any) -> str:
    # JSON may escape half of a surrogate pair, which neither tokenizers nor file systems take, and neither do they NUL.
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", errors="replace").decode("utf-8").replace("\0", "").strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _list(value: Any) -> list[Any]:
    """Return a list as it is, or from its JSON; empty where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []
