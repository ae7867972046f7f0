"""Class names behind learned vectors, read by a frozen text tower (CoOp, Zhou et al. 2022; specification 7.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.text import TextTower


class LearnedPrompts(nn.Module):
    """Vectors of the prompts [start, contexts, name, end] of all classes, un-normalised.

    The tower is frozen, and lets the gradient through to the contexts. Call `init_weights` before use.

    Args:
        tower: is kept, not copied.
        names: of the classes.
        contexts: how many learned vectors stand before every name.
        room: tokens of the longest name, start and end included.

    Raises:
        UserError: a name is longer than `room`, or the prompt longer than the tower's context.
    """

    def __init__(self, tower: TextTower, names: Sequence[str], contexts: int, room: int) -> None:
        super().__init__()
        if contexts + room > tower.context:
            raise UserError(
                f"{contexts} learned vectors and {room} tokens are more than the {tower.context} that the text tower "
                "reads: lower --contexts or --room."
            )
        for name in names:
            if (count := tower.tokenizer.count(name)) > room:
                raise UserError(
                    f"the class name '{name}' takes {count} tokens with start and end, and the prompt has room for "
                    f"{room}: set --room {count}."
                )
        self.tower = tower.requires_grad_(False)
        self.contexts = nn.Parameter(torch.empty(contexts, tower.config.width))
        self.ids: Tensor
        self.register_buffer("ids", tower.filled(tower.tokenizer.encode_all(names, room)), persistent=False)

    def init_weights(self, at: Key) -> None:
        """Set the contexts from `at`: N(0, 1), cut off at two, as in DenseCLIP's code."""
        with torch_seeded(at):
            nn.init.trunc_normal_(self.contexts)

    def forward(self, contexts: Tensor | None = None) -> Tensor:
        """Return the vectors (K, E); (B, K, E) where contexts (B, C, W) of every image take the learned ones' place."""
        learned = (self.contexts[None] if contexts is None else contexts)[:, None]
        images, classes = len(learned), len(self.ids)
        words = self.tower.token_embedding(self.ids)
        first = int((self.ids[:, 0] == self.tower.tokenizer.start).all())
        parts = (
            words[None, :, :first].expand(images, -1, -1, -1),
            learned.expand(-1, classes, -1, -1).to(words.dtype),
            words[None, :, first:].expand(images, -1, -1, -1),
        )
        vectors = self.tower.read(torch.cat(parts, dim=2).flatten(0, 1), self._place(first).repeat(images))
        return vectors if contexts is None else vectors.unflatten(0, (images, classes))

    def _place(self, first: int) -> Tensor:
        """Return where each class's feature is read (K,), behind the contexts that were put in."""
        filler = self.ids.new_full((len(self.ids), len(self.contexts)), self.tower.tokenizer.start)
        return self.tower.place(torch.cat([self.ids[:, :first], filler, self.ids[:, first:]], dim=1))
