"""BEiT: name the visual words of masked patches (Bao et al. 2022; specification B2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.masks import block_mask, of_196
from altsight.data.views import Crop, to_unit
from altsight.losses.tokens import token_ce_sum
from altsight.methods.base import Corpus, Method
from altsight.nn.codebook import usage
from altsight.nn.encoder import Encoder
from altsight.nn.init import cut_at_std, fill
from altsight.nn.tokens import PatchTokenizer, TokenizerConfig


@dataclass(frozen=True)
class BEiTPrepare:
    """Document -> image: uint8 (3, size, size); mask: (L,) bool, True where the patch is masked, in blocks."""

    crop: Crop
    size: int
    grid: tuple[int, int]
    count: int
    least: int
    aspect: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        if not document.images:
            return None
        mask = block_mask(self.grid, self.count, at, self.least, aspect=self.aspect)
        return {"image": self.crop(document.images[0], self.size, at), "mask": mask}


class BEiT(Method):
    """BERT for images. Images alone; text and labels are not looked at.

    L = mean over the masked patches of -log p(word of the patch).

    The words are those of a codebook of the toolkit's own unless `tokenizer.path` names another tokenizer: BEiT's, the
    discrete VAE of DALL-E, cannot be fetched. What the paper does to the encoder itself is set there: --encoder.init
    beit --encoder.positions none --encoder.relative-positions True --encoder.layer-scale 0.1 --encoder.drop-path 0.1.
    Its colour jitter is left out: all methods of a study see the same crop.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of BEiT at the paper's values."""

        tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
        mask_patches: int = 75
        """Masked patches of 14 x 14, scaled to other grids; where no block fits any more there are fewer."""
        least_block: int = 16
        """Smallest block that is drawn, in patches of 14 x 14, scaled likewise."""
        aspect: float = 0.3
        """Blocks are at most 1 / aspect times as long as wide."""

    # Absolute learning rate at a batch of 2048.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-3,
        lr_base_batch=0,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        warmup_fraction=10 / 800,
        min_lr=1e-5,
        clip_norm=3.0,
    )
    masked: ClassVar[bool] = True

    def __init__(self, config: BEiT.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = PatchTokenizer(config.tokenizer, encoder.patch_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.width))
        self.head = nn.Linear(encoder.width, config.tokenizer.vocabulary)
        self.used: Tensor | None = None
        """How the last micro-batch used the words; for the log alone."""

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`: mask token and head N(0, 0.02), cut off at one deviation."""
        super().init_weights(at)
        self.tokenizer.init_weights(at.child("tokenizer"))
        with torch_seeded(at.child("head")):
            cut_at_std(self.mask_token)
            fill(self.head, cut_at_std)

    def prepare(self, crop: Crop, size: int) -> BEiTPrepare:
        """Return the preparation: one crop and one block-wise mask.

        Raises:
            UserError: the tokenizer's file is missing or makes no tokens for these patches.
        """
        self.tokenizer.check(size)
        side = size // self.encoder.patch_size
        least = of_196(self.config.least_block, (side, side))
        return BEiTPrepare(crop, size, (side, side), self._count(side), least, self.config.aspect)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches."""
        return {"tokens": batch["mask"].sum()}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode with mask tokens in place of the masked patches, and name the words of these from their outputs."""
        images, mask = self.encoder.normalize(batch["image"]), batch["mask"]
        encoded = self.encoder(images, mask=mask, mask_token=self.mask_token.view(-1))
        words = self.tokenizer(to_unit(images, self.encoder.config.normalization))
        # As many places of every image as can be masked, the masked ones first: no shape depends on the masks.
        count = self._count(images.shape[-1] // self.encoder.patch_size)
        places = mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        wanted, targets = mask.gather(1, places), words.gather(1, places)
        states = encoded.patches.gather(1, places.unsqueeze(-1).expand(-1, -1, self.encoder.width))
        self.used = usage(words, self.config.tokenizer.vocabulary)
        return Outputs(local={"tokens": token_ce_sum(self.head(states), targets, wanted)})

    def _count(self, side: int) -> int:
        """Return the largest number of masked patches among `side` x `side`."""
        return of_196(self.config.mask_patches, (side, side))

    def report(self) -> dict[str, float]:
        """Return the share of the commonest word among all patches, and the entropy of the words in bits."""
        return {} if self.used is None else dict(zip(("top_word", "word_bits"), self.used.tolist(), strict=True))
