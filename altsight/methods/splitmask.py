"""SplitMask: two halves of an image name each other's words and find each other (El-Nouby et al. 2021; spec. 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.masks import block_mask, of_196
from altsight.data.views import Crop, random_keep, to_unit
from altsight.losses.contrastive import clip_loss
from altsight.losses.tokens import token_ce_sum
from altsight.methods.base import Corpus, Method
from altsight.nn.codebook import usage
from altsight.nn.encoder import Encoder
from altsight.nn.init import fill, reset, sincos_2d, truncated
from altsight.nn.text import LayerNorm
from altsight.nn.tokens import PatchTokenizer, TokenizerConfig

Split = Literal["block", "uniform"]


@dataclass(frozen=True)
class SplitMaskPrepare:
    """Document -> image: uint8 (3, size, size); a, b: int64, the sorted patches of both halves, all of them together.

    Of an odd number of patches, b has one more.
    """

    crop: Crop
    size: int
    grid: tuple[int, int]
    split: Split
    largest: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        patches = self.grid[0] * self.grid[1]
        if self.split == "block":
            mask = block_mask(self.grid, patches // 2, at, most=self.largest, exact=True)
        else:
            mask = torch.zeros(patches, dtype=torch.bool)
            mask[random_keep(patches, 0.5, at)] = True
        a, b = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        return {"image": self.crop(document.images[0], self.size, at), "a": a, "b": b}


class SplitDecoder(nn.Module):
    """Tokens of a half -> states of all patches: a shallow transformer of the encoder's width over mask tokens."""

    def __init__(self, depth: int, encoder: Encoder) -> None:
        super().__init__()
        self.grid, self.prefix = encoder.grid, encoder.prefix
        width = encoder.width
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, encoder.num_patches, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, encoder.heads, qkv_bias=True) for _ in range(depth)))
        self.norm = LayerNorm(width, eps=1e-6)

    def init_weights(self, at: Key) -> None:
        """Set every parameter from `at`: maps and mask token N(0, 0.02), fixed sine-cosine positions."""
        with torch_seeded(at), torch.no_grad():
            reset(self)
            fill(self, truncated)
            truncated(self.mask_token)
            self.positions[0] = sincos_2d(self.positions.shape[-1], self.grid)

    def forward(self, tokens: Tensor, keep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the states of all patches (B, L, D), in image order.

        Args:
            tokens: (B, prefix + K, D) encoded tokens of a half, the prefix (CLS, registers) first.
            keep: (B, K) which patch each of the K tokens is.
            grid: of the image's patches, to which positions are resampled; None: that of the encoder's full input.
        """
        grid = grid or self.grid
        at = keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), grid[0] * grid[1], -1)
        positions = resample_abs_pos_embed(self.positions, list(grid), list(self.grid), 0)
        patches = hidden.scatter(1, at, tokens[:, self.prefix :]) + positions
        x = torch.cat([tokens[:, : self.prefix], patches], dim=1)
        return self.norm(self.blocks(x))[:, self.prefix :]


class SplitMask(Method):
    """Inpainting and matching of two complementary halves. Images alone; text and labels are not looked at.

    L = inpaint_weight * [CE of b's words from a + CE of a's words from b] + match_weight * InfoNCE of the halves' mean
    states.

    The same encoder sees either half, without mask tokens. No code was released: what the paper leaves open is marked
    [unconfirmed]. The recipe for small data sets (a quarter of the patches seen, colour) is left out.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SplitMask at the paper's values."""

        tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
        split: Split = "block"
        """block: one half is made of BEiT's blocks; uniform: every patch is drawn by itself."""
        decoder_depth: int = 2
        """Layers of the decoder, of the encoder's width and heads ([unconfirmed]: the heads; that the class token and
        positions of seen patches enter it; that there is no head before matching)."""
        temperature: float = 0.2
        """What the cosines of the halves are divided by."""
        inpaint_weight: float = 1.0
        """[unconfirmed]: of each half's cross-entropy."""
        match_weight: float = 1.0
        """[unconfirmed]: of the contrastive loss, here the mean of both directions."""

    # BEiT's, which the paper follows; it states a batch of 2048 and 300 epochs.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-3,
        lr_base_batch=0,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup_fraction=10 / 300,
        min_lr=1e-5,
        clip_norm=3.0,
    )
    shares: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    def __init__(self, config: SplitMask.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        if encoder.num_patches < 2:
            raise UserError("splitmask halves the patches of an image, and there is one: use smaller patches.")
        self.config = config
        self.tokenizer = PatchTokenizer(config.tokenizer, encoder.patch_size)
        self.decoder = SplitDecoder(config.decoder_depth, encoder)
        self.head = nn.Linear(encoder.width, config.tokenizer.vocabulary)
        self.used: Tensor | None = None
        """How the last micro-batch used the words; for the log alone."""

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.tokenizer.init_weights(at.child("tokenizer"))
        self.decoder.init_weights(at.child("decoder"))
        with torch_seeded(at.child("head")):
            fill(self.head, truncated)

    def prepare(self, crop: Crop, size: int) -> SplitMaskPrepare:
        """Return the preparation: one crop, and the patches in two halves.

        Raises:
            UserError: the tokenizer's file is missing or makes no tokens for these patches.
        """
        self.tokenizer.check(size)
        side = size // self.encoder.patch_size
        return SplitMaskPrepare(crop, size, (side, side), self.config.split, of_196(75, (side, side)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the patches that each half predicts: those of the other."""
        a, b = batch["a"], batch["b"]
        return {"b_from_a": b.new_tensor(b.numel()), "a_from_b": a.new_tensor(a.numel())}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode each half, fill in the other, name the words of what was filled in, and average all states."""
        images = self.encoder.normalize(batch["image"])
        words = self.tokenizer(to_unit(images, self.encoder.config.normalization))
        self.used = usage(words, self.config.tokenizer.vocabulary)
        grid = (images.shape[2] // self.encoder.patch_size, images.shape[3] // self.encoder.patch_size)
        out = Outputs()
        for half, other in (("a", "b"), ("b", "a")):
            seen, hidden = batch[half], batch[other]
            states = self.decoder(self.encoder(images, seen).tokens, seen, grid)
            filled = states.gather(1, hidden.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
            out.local[f"{other}_from_{half}"] = token_ce_sum(self.head(filled), words.gather(1, hidden))
            out.shared[half] = states.mean(dim=1)
        return out

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of InfoNCE between the halves' averages, over the global batch."""
        a, b = shared["a"], shared["b"]
        return {"match": clip_loss(a, b, a.new_tensor(1 / self.config.temperature))}

    def weights(self) -> dict[str, float]:
        """Return the weights of the three losses."""
        inpaint = self.config.inpaint_weight
        return {"b_from_a": inpaint, "a_from_b": inpaint, "match": self.config.match_weight}

    def report(self) -> dict[str, float]:
        """Return the share of the commonest word among all patches, and their entropy in bits."""
        return {} if self.used is None else dict(zip(("top_word", "word_bits"), self.used.tolist(), strict=True))
