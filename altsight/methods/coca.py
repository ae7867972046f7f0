"""CoCa: one decoder pass matches texts with images and writes captions (Yu et al. 2022; specification A4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.views import Crop
from altsight.losses.captioning import next_token_ce_sum, target_count
from altsight.losses.contrastive import clip_loss
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.methods.mae import inference
from altsight.nn.coca import CoCaDecoderConfig, MultimodalText, UnimodalText
from altsight.nn.decoding import GREEDY, Decoding, write
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.pool import AttentionPool


class CoCa(Method):
    """Contrastive captioner: the text half of the decoder yields text embeddings, the other half captions.

    The loss is contrastive_weight * (CE of texts given an image + CE of images given a text) + caption_weight * (CE of
    the next token given the image). Two attentional poolers read the patch tokens: a generative one with many queries,
    for the captions, and a contrastive one with a single query, for the image embedding. For the paper's encoder set
    --encoder.img-size 288 --encoder.patch-size 18.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of CoCa-Base."""

        decoder: CoCaDecoderConfig = field(default_factory=CoCaDecoderConfig)
        queries: int = 256
        """Image tokens that the captions see."""
        poolers: Literal["cascade", "parallel", "one"] = "cascade"
        """cascade: the contrastive pooler reads the generative one's tokens; parallel: both read the encoder's; one:
        there is one, with layer norms, and its first token is the image embedding (open_clip's CoCa)."""
        contrastive_weight: float = 1.0
        caption_weight: float = 2.0
        temperature: float = 0.07
        """What the cosines are divided by at the start; learned from there."""
        max_scale: float = 100.0
        """Largest inverse temperature. [unconfirmed]: CLIP's."""

    # The paper's Adafactor is that of "Scaling Vision Transformers", with momentum and a bounded beta2. timm's
    # `adafactorbv` is the same: it steps by the learning rate itself, where `adafactor` steps relative to the weights.
    optim: ClassVar[OptimConfig] = OptimConfig(
        name="adafactorbv",
        lr=8e-4,
        lr_base_batch=0,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        eps=1e-30,
        warmup_fraction=0.02,
        schedule="linear",
    )
    shares: ClassVar[bool] = True
    drops_patches: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: UnimodalText

    def __init__(self, config: CoCa.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("coca")
        width, heads = config.decoder.width, config.decoder.heads
        self.text = UnimodalText(config.decoder, self.tokenizer)
        self.captions = MultimodalText(config.decoder, self.tokenizer.vocab_size)
        one = config.poolers == "one"
        self.generative = AttentionPool(encoder.width, width, heads, config.queries, normed=one)
        read = width if config.poolers == "cascade" else encoder.width
        self.contrastive = None if one else AttentionPool(read, width, heads, 1)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.text.init_weights(at.child("text"))
        self.captions.init_weights(at.child("captions"))
        self.generative.init_weights(at.child("generative"))
        if self.contrastive is not None:
            self.contrastive.init_weights(at.child("contrastive"))
        nn.init.constant_(self.logit_scale, -math.log(self.config.temperature))

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the text's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.text.context)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count caption tokens."""
        return {"caption": target_count(batch["text"], self.tokenizer.end)}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the joint features (B, W) of images and texts, and the caption loss, from one pass of each tower."""
        ids = batch["text"]
        patches = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible")).patches
        tokens, image = self._pool(patches)
        states = self.text.states(ids)
        # The CLS state, and that of the last token, which has nothing to predict, end here.
        logits = self.captions(states[:, :-2], tokens)
        return Outputs(
            shared={"image": image, "text": self.text.embedding(states)},
            local={"caption": next_token_ce_sum(logits, ids, self.tokenizer.end)},
        )

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the contrastive loss: the sum of both directions, twice CLIP's mean."""
        return {"contrastive": 2 * clip_loss(shared["image"], shared["text"], self.logit_scale.exp())}

    def weights(self) -> dict[str, float]:
        """Return the weights of the two losses."""
        return {"contrastive": self.config.contrastive_weight, "caption": self.config.caption_weight}

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the image embedding (B, W)."""
        return self._pool(encoded.patches)[1]

    def _pool(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image tokens (B, queries, W) and the image embedding (B, W)."""
        tokens = self.generative(patches)
        if self.contrastive is None:
            return tokens, tokens[:, 0]
        return tokens, self.contrastive(tokens if self.config.poolers == "cascade" else patches)[:, 0]

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale between 1 and `max_scale`."""
        self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def report(self) -> dict[str, float]:
        """Return the inverse temperature."""
        return {"scale": self.logit_scale.exp().item()}

    def caption(
        self, images: Tensor, max_length: int | None = None, prefix: str = "", decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8, starting with `prefix`; see MUG's."""
        length = self.config.decoder.length
        with inference(self):
            tokens = self.generative(self.encoder(self.encoder.normalize(images)).patches)

            def step(ids: Tensor, rows: Tensor) -> Tensor:
                logits: Tensor = self.captions(self.text.states(ids)[:, :-1], tokens[rows])
                return logits[:, -1]

            return write(step, self.tokenizer, images, prefix, min(max_length or length, length), decoding)
