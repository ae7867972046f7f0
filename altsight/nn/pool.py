"""Pooling by attention: learned queries that look at the tokens of an image.

Sources: Zhai et al. 2022, "Scaling Vision Transformers", for SigLIP's head (specification A5); Yu et al. 2022, CoCa
(specification A4), for poolers with many queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.nn.init import fill, reset
from altsight.nn.text import LayerNorm


class AttentionPool(nn.Module):
    """Tokens (B, S, width_in) -> (B, queries, width_out): one multi-head attention of learned queries. No residual.

    Call `init_weights` before use.

    Args:
        width_in: width of the tokens.
        width_out: width of the queries and of what comes out.
        heads: of the attention.
        queries: how many vectors come out.
        normed: layer norms on queries and tokens, as in open_clip's CoCa.

    Raises:
        UserError: `width_out` is not divisible by the number of heads.
    """

    def __init__(self, width_in: int, width_out: int, heads: int, queries: int, normed: bool = False) -> None:
        super().__init__()
        if width_out % heads:
            raise UserError(f"{heads} heads do not divide the width {width_out} of an attention pool: change one.")
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, width_out))
        self.query, self.out = nn.Linear(width_out, width_out), nn.Linear(width_out, width_out)
        # A bias on the keys moves all scores of a query alike, which the softmax takes away again.
        self.key, self.value = nn.Linear(width_in, width_out, bias=False), nn.Linear(width_in, width_out)
        self.query_norm = LayerNorm(width_out) if normed else None
        self.token_norm = LayerNorm(width_in) if normed else None

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: Xavier for the maps, biases 0, queries N(0, 1)."""
        with torch_seeded(at):
            reset(self)
            for linear in (self.query, self.key, self.value, self.out):
                nn.init.xavier_uniform_(linear.weight)
            for linear in (self.query, self.value, self.out):
                nn.init.zeros_(linear.bias)
            nn.init.normal_(self.queries)

    def forward(self, tokens: Tensor) -> Tensor:
        queries: Tensor = self.queries
        if self.query_norm is not None and self.token_norm is not None:
            queries, tokens = self.query_norm(queries), self.token_norm(tokens)
        # The queries are the same for every image, so their map is computed once.
        flat = (self.query(queries).expand(tokens.shape[0], -1, -1), self.key(tokens), self.value(tokens))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in flat)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MAPHead(nn.Module):
    """Tokens (B, S, D) -> (B, D): SigLIP's multi-head attention pooling. Call `init_weights` before use.

    One learned probe looks at the tokens; then x + MLP(LN(x)).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.pool = AttentionPool(width, width, heads, queries=1)
        # The source's layer norms add 1e-6, as those of the encoder do.
        self.norm = LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: Xavier for the maps and the probe, biases 0."""
        self.pool.init_weights(at.child("pool"))
        with torch_seeded(at.child("mlp")):
            reset(self.norm)
            nn.init.xavier_uniform_(self.pool.queries)
            fill(self.mlp, nn.init.xavier_uniform_)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of two dimensions that do not decay: the probe."""
        return {"pool.queries"}

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.pool(tokens)[:, 0]
        return x + self.mlp(self.norm(x))
