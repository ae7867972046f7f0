"""Writing captions a token at a time: the likeliest token, a beam of captions, or a draw from the likeliest tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.text import Tokenizer

Continue = Callable[[Tensor, Tensor], Tensor]
"""Ids (N, T) of captions so far, and the image (N,) that each is of -> logits (N, V) of their next tokens."""

_UNWRITTEN = ("[UNK]", "<unk>", "[MASK]", "<mask>")
"""Tokens that stand for no text, where a known tokenizer has them."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Raises:
        UserError: a setting is out of its range.
    """

    how: Literal["greedy", "beam", "nucleus"] = "greedy"
    """greedy: the likeliest token; beam: the best of several captions that are written side by side; nucleus: a draw
    from the likeliest tokens (Holtzman et al. 2020)."""
    beams: int = 5
    """Captions side by side: 5 in VirTex and VisualGPT, 6 in open_clip's CoCa."""
    length_penalty: float = 1.0
    """A beam is judged by its log-probability over its number of tokens to this power; 0: longer ones are worse."""
    top_p: float = 0.9
    """Share of the probability that the nucleus holds: the fewest tokens that reach it."""
    temperature: float = 1.0
    """What the nucleus divides the logits by: below 1 the likely tokens become likelier."""
    seed: int = 0
    """Of the nucleus' draws."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"a beam of {self.beams} captions writes none: set --decoding.beams to 1 or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"a nucleus cannot hold a share of {self.top_p:g}: set --decoding.top-p within (0, 1].")
        if self.temperature <= 0:
            raise UserError(f"a temperature of {self.temperature:g} is none: set --decoding.temperature above 0.")


GREEDY = Decoding()
BEAM = Decoding("beam")


def write(
    step: Continue, tokenizer: Tokenizer, images: Tensor, prefix: str, max_length: int, decoding: Decoding = GREEDY
) -> list[str]:
    """Return a caption of each of `images` (B, ...) that starts with the words `prefix`.

    max_length: longest caption in tokens, start and end included.
    """
    words = tokenizer.model.encode(prefix, add_special_tokens=False).ids
    start = torch.tensor([tokenizer.start, *words][:max_length], device=images.device)
    ids = generate(step, tokenizer, images, start.expand(len(images), -1), max_length, decoding)
    return [tokenizer.decode(row) for row in ids.tolist()]


def without_repeats(text: str) -> str:
    """Return `text` with no word twice in a row, which VisualGPT does before scoring (specification 8.2)."""
    return " ".join(word for word, _ in itertools.groupby(text.split()))


@torch.no_grad()
def generate(
    step: Continue, tokenizer: Tokenizer, images: Tensor, prefix: Tensor, max_length: int, decoding: Decoding = GREEDY
) -> Tensor:
    """Continue `prefix` (B, T) for each of `images` (B, ...): (B, up to max_length) ids.

    Stops when every caption has reached the end token; those that reached it earlier repeat it. Padding, start and
    what stands for no text are never written, as in MUG's demo (specification MUG 1.9). The prefix is computed anew
    for each token: captions are short. What a nucleus draws for an image depends on the seed and the image's values
    alone, not on the batch that it is in.
    """
    if decoding.how == "beam":
        return all_beams(step, tokenizer, prefix, max_length, decoding)[:, 0]
    allowed = _allowed(step, tokenizer)
    if decoding.how == "greedy":
        return _extend(allowed, tokenizer.end, prefix, max_length, lambda logits, _: logits.argmax(dim=-1))
    draws = _draws(images, max_length, decoding.seed)
    return _extend(
        allowed,
        tokenizer.end,
        prefix,
        max_length,
        lambda logits, place: nucleus(logits, draws[:, place], decoding.top_p, decoding.temperature),
    )


@torch.no_grad()
def all_beams(step: Continue, tokenizer: Tokenizer, prefix: Tensor, max_length: int, decoding: Decoding) -> Tensor:
    """Return all captions (B, up to beams, up to max_length) that a beam search keeps, the best first."""
    allowed = _allowed(step, tokenizer)
    return beam(allowed, tokenizer.end, prefix, max_length, decoding.beams, decoding.length_penalty)


def _allowed(step: Continue, tokenizer: Tokenizer) -> Continue:
    """Return `step` with the logits of what is never written at -inf, fp32."""
    unwritten = [tokenizer.model.token_to_id(name) for name in _UNWRITTEN]
    banned = [token for token in {tokenizer.pad, tokenizer.start, *unwritten} - {None} if token != tokenizer.end]

    def allowed(ids: Tensor, rows: Tensor) -> Tensor:
        logits = step(ids, rows).float()
        logits[:, banned] = -torch.inf
        return logits

    return allowed


def _extend(step: Continue, end: int, ids: Tensor, max_length: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Append to `ids` (B, T) what `choose` makes of the logits (B, V) of the token at a place, until all have ended."""
    rows = torch.arange(len(ids), device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < max_length and not done.all():
        token = choose(step(ids, rows), ids.shape[1]).masked_fill(done, end)
        ids = torch.cat([ids, token.unsqueeze(1)], dim=1)
        done |= token == end
    return ids


def nucleus(logits: Tensor, draws: Tensor, top_p: float, temperature: float) -> Tensor:
    """Return the tokens (B,) that `draws` (B,), uniform in [0, 1), pick from the fewest tokens that hold `top_p`.

    logits: (B, V) fp32. Tokens are picked by the inverse of their cumulative probability, likeliest first.
    """
    chances, tokens = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    inside = chances.cumsum(dim=-1) - chances < top_p
    reached = (chances * inside).cumsum(dim=-1)
    place = (reached <= draws.unsqueeze(1) * reached[:, -1:]).sum(dim=-1)
    # A draw just below 1 may be rounded to 1.
    place = place.minimum(inside.sum(dim=-1) - 1)
    return tokens.gather(1, place.unsqueeze(1)).squeeze(1)


def _draws(images: Tensor, count: int, seed: int) -> Tensor:
    """Return uniform numbers (B, count), each row a function of the seed and its image."""
    rows = []
    for image in images:
        digest = hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=7).digest()
        rows.append(key(seed, int.from_bytes(digest, "little"), "nucleus").generator().random(count))
    return torch.from_numpy(np.stack(rows)).to(images.device, torch.float32)


def beam(step: Continue, end: int, prefix: Tensor, max_length: int, beams: int, length_penalty: float) -> Tensor:
    """Return the captions (B, up to beams, up to max_length) of a beam search from `prefix` (B, T), the best first.

    A caption's score is the sum of its tokens' log-probabilities, those of the prefix left out, over their number to
    the power `length_penalty`, the end token counted. Captions that have ended stay in the beam and compete with those
    that go on, as in VisualGPT's code.
    """
    count, device = len(prefix), prefix.device
    ids, width = prefix.unsqueeze(1), 1
    total = torch.zeros(count, 1, device=device)
    length, done = torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)
    while ids.shape[2] < max_length and not done.all():
        rows = torch.arange(count, device=device).repeat_interleave(width)
        chances = step(ids.flatten(0, 1), rows).float().log_softmax(dim=-1).unflatten(0, (count, width))
        # What has ended repeats its end token, for nothing.
        ended = torch.full_like(chances[0, 0], -torch.inf).index_fill(0, torch.tensor([end], device=device), 0.0)
        chances = torch.where(done.unsqueeze(2), ended, chances)
        length = length + ~done
        scores = (total.unsqueeze(2) + chances) / length.unsqueeze(2) ** length_penalty
        width = min(beams, scores[0].numel())
        best = scores.flatten(1).topk(width, dim=1).indices
        parent, token = best // chances.shape[2], best % chances.shape[2]
        total = (total.unsqueeze(2) + chances).flatten(1).gather(1, best)
        ids = torch.cat([ids.gather(1, parent.unsqueeze(2).expand(-1, -1, ids.shape[2])), token.unsqueeze(2)], dim=2)
        length, done = length.gather(1, parent), done.gather(1, parent) | (token == end)
    return ids
