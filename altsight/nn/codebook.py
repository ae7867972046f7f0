"""Codebooks: words of pixels for the patches of an image, and how they are made, kept and looked up.

A codebook is a tensor (V, 3 * patch * patch) of length-1 rows in the layout of `cut`. A patch is the word with the
highest cosine similarity to its pixels (El-Nouby et al. 2021; specification 6.2). The words are uniform noise, patches
of the corpus, or centres of k-means over them; the paper finds no difference between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.data.views import normalize

NORMALIZATION = "imagenet"
"""What pixels are normalised by before they are compared with words, whatever the encoder is given."""
CHUNK = 4096
"""Patches that are compared with all words at a time (128 MiB of similarities at 8192 words); k-means takes at least
as many in one step."""

Kind = Literal["kmeans", "patches"]


def cut(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, 3, H, W), uint8 or in [0, 1], into normalised patches (B, L, 3 * patch * patch), row by row."""
    return F.unfold(normalize(images, NORMALIZATION), patch, stride=patch).transpose(1, 2)


def nearest(patches: Tensor, words: Tensor) -> Tensor:
    """Return for each of `patches` (n, P) the index of the word in `words` (V, P) with the highest cosine: (n,) int64.

    The words have length 1, and the length of a patch does not change which is highest.
    """
    return torch.cat([(part @ words.T).argmax(dim=1) for part in patches.split(CHUNK)])


def random_projection(vocabulary: int, patch: int, at: Key, zero_mean: bool = False) -> Tensor:
    """Return a codebook of noise: every component uniform in [-1, 1], [unconfirmed], before the length is set to 1."""
    with torch_seeded(at):
        return _unit(torch.empty(vocabulary, 3 * patch * patch).uniform_(-1, 1), zero_mean)


def train_codebook(
    images: Iterable[Tensor],
    vocabulary: int,
    patch: int,
    at: Key,
    kind: Kind = "kmeans",
    zero_mean: bool = False,
    per_image: int = 30,
) -> Tensor:
    """Return a codebook (V, 3 * patch * patch) made of patches of `images`.

    patches: the words are one random patch of each of the first V images; where there are fewer images, a second of
    each, and so on up to `per_image`. kmeans: centres of mini-batch k-means over `per_image` random patches of every
    image. The patches have length 1, so that the nearest centre is about the one with the highest cosine.

    Args:
        images: uint8 (3, H, W) each; read once, and not kept.
        zero_mean: take the mean off every patch, so that brightness does not matter.

    Raises:
        UserError: there are fewer patches than words.
    """
    random = at.child("patches").generator()
    drawn = (_draw(image, patch, per_image, random, zero_mean) for image in images)
    words = _some(drawn, vocabulary) if kind == "patches" else _centres(drawn, vocabulary, at)
    return _unit(words, zero_mean)


def _draw(image: Tensor, patch: int, count: int, random: np.random.Generator, zero_mean: bool) -> Tensor:
    """Return up to `count` different patches of `image`, normalised and of length 1: (n, 3 * patch * patch)."""
    patches = cut(image[None], patch)[0]
    return _unit(patches[random.permutation(len(patches))[:count]], zero_mean)


def _some(drawn: Iterable[Tensor], vocabulary: int) -> Tensor:
    parts = list(itertools.islice(drawn, vocabulary))
    # First one patch of each image, then the second of each ...
    most = max(map(len, parts), default=0)
    ordered = [part[i] for i in range(most) for part in parts if i < len(part)]
    _check_enough(len(ordered), vocabulary)
    return torch.stack(ordered[:vocabulary])


def _centres(drawn: Iterable[Tensor], vocabulary: int, at: Key) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans

    seed = at.child("kmeans").integer() % 2**32
    model: Any = MiniBatchKMeans(vocabulary, init="random", n_init=1, random_state=seed)
    seen = 0
    for part in _joined(drawn, max(3 * vocabulary, CHUNK)):
        seen += len(part)
        _check_enough(seen, vocabulary)
        model.partial_fit(part.numpy())
    _check_enough(seen, vocabulary)
    return torch.from_numpy(np.ascontiguousarray(model.cluster_centers_, dtype=np.float32))


def _joined(parts: Iterable[Tensor], least: int) -> Iterator[Tensor]:
    """Yield `parts` put together until they have `least` rows, and the rest."""
    waiting, rows = list[Tensor](), 0
    for part in parts:
        waiting.append(part)
        rows += len(part)
        if rows >= least:
            yield torch.cat(waiting)
            waiting, rows = [], 0
    if waiting:
        yield torch.cat(waiting)


def _check_enough(patches: int, vocabulary: int) -> None:
    if patches < vocabulary:
        raise UserError(
            f"{patches:,} patches cannot make {vocabulary:,} words: use more images or a smaller vocabulary."
        )


def _unit(words: Tensor, zero_mean: bool) -> Tensor:
    """Return `words` (n, P) at length 1, their means taken off before where that is asked for.

    A patch has the same product with a word that has no mean whether its own is taken off or not: what looks words up
    need not know.
    """
    return F.normalize(words - words.mean(dim=1, keepdim=True) if zero_mean else words, dim=1)


def save_codebook(words: Tensor, path: Path) -> None:
    """Write `words` as safetensors."""
    save_file({"words": words.contiguous()}, path)


def load_codebook(path: Path) -> Tensor:
    """Read what `save_codebook` wrote.

    Raises:
        UserError: it is no codebook.
    """
    try:
        words = load_file(path).get("words")
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): train it again with `altsight codebook`.") from None
    if words is None or words.ndim != 2:
        raise UserError(f"'{path}' is no codebook: train one with `altsight codebook`.")
    return F.normalize(words.float(), dim=1)


def usage(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return how `tokens` (any shape) use the words: (share of the commonest, entropy in bits), fp32 (2,).

    A share above one half makes a poor target (specification 6.2).
    """
    ones = torch.ones(tokens.numel(), device=tokens.device)
    share = torch.zeros(vocabulary, device=tokens.device).scatter_add(0, tokens.flatten(), ones) / max(1, len(ones))
    return torch.stack([share.max(), -torch.special.xlogy(share, share).sum() / np.log(2)])
