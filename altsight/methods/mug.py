"""MUG: generate pixels and caption from one masked encoding (Zhao et al. 2024, arXiv 2301.07088; specification MUG).

What the paper's abstract, its Algorithm 1 and the authors' demo leave open is marked [unconfirmed] in the
configuration; its value is then a best guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.rng import Key
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.captioning import next_token_ce_sum, target_count
from altsight.methods.base import Corpus, Method
from altsight.methods.mae import MAEPrepare, MaskedPixels, inference
from altsight.nn.decoder import CaptionDecoder, CaptionDecoderConfig, PixelDecoderConfig
from altsight.nn.decoding import GREEDY, Decoding, write
from altsight.nn.encoder import Encoder


@dataclass(frozen=True)
class MUGPrepare:
    """MAE's image and keep, and text: (length,) int64. None without an image or a text."""

    masked: MAEPrepare
    tokenizer: Tokenizer
    length: int

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.masked(document, at) if document.texts else None
        if example is not None:
            example["text"] = self.tokenizer.encode(document.texts[0], self.length)
        return example


class MUG(Method):
    """Multi-modal generator: one encoding of the visible patches feeds a pixel and a caption decoder.

    L = recon_weight * MSE of the masked patches (normalised pixels) + caption_weight * CE of the next tokens.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of MUG; MAE's where the paper follows MAE."""

        mask_ratio: float = 0.75
        norm_pix: bool = True
        recon_weight: float = 1.0
        """[unconfirmed]"""
        caption_weight: float = 0.1
        """[unconfirmed]: balances normalised-pixel errors near 0.45 with caption losses near 3 nats."""
        decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
        """[unconfirmed]: the demo builds MAE's default."""
        captions: CaptionDecoderConfig = field(default_factory=CaptionDecoderConfig)

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-4, lr_base_batch=256, weight_decay=0.05, betas=(0.9, 0.95), warmup_fraction=40 / 400
    )
    masked: ClassVar[bool] = True

    def __init__(self, config: MUG.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("mug")
        self.pixels = MaskedPixels(encoder, config.decoder, config.mask_ratio, config.norm_pix)
        self.captions = CaptionDecoder(config.captions, self.tokenizer.vocab_size, encoder.width)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.pixels.init_weights(at.child("pixels"))
        self.captions.init_weights(at.child("captions"))

    def prepare(self, crop: Crop, size: int) -> MUGPrepare:
        """Return the preparation: MAE's crop and mask, and the caption's tokens."""
        masked = MAEPrepare(crop, size, self.encoder.patches_at(size), self.config.mask_ratio)
        return MUGPrepare(masked, self.tokenizer, self.config.captions.length)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches and caption tokens."""
        return {
            "pixels": self.pixels.count(batch["keep"], self.encoder.input_grid),
            "caption": target_count(batch["text"], self.tokenizer.end),
        }

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the visible patches once; both decoders read all of its tokens, CLS included."""
        images = self.encoder.normalize(batch["image"])
        latent = self.encoder(images, batch["keep"]).tokens
        logits = self.captions(batch["text"][:, :-1], latent)
        return Outputs(
            local={
                "pixels": self.pixels.loss_sum(latent, batch["keep"], images),
                "caption": next_token_ce_sum(logits, batch["text"], self.tokenizer.end),
            }
        )

    def weights(self) -> dict[str, float]:
        """Return the weights of the two losses."""
        return {"pixels": self.config.recon_weight, "caption": self.config.caption_weight}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the images of `batch` with their masked patches as predicted: (B, 3, H, W) fp32 in [0, 1]."""
        with inference(self):
            images = self.encoder.normalize(batch["image"])
            return self.pixels.reconstruct(self.encoder(images, batch["keep"]).tokens, batch["keep"], images)

    def caption(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        max_length: int | None = None,
        prefix: str = "a",
        decoding: Decoding = GREEDY,
    ) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8, starting with `prefix`.

        Args:
            images: at the encoder's size.
            keep: (B, K) visible patches, to caption from a masked image as in training; None: all of them.
            max_length: longest caption in tokens, start and end included; None: that of training.
            prefix: first words. Web captions start in many ways, and a lone start token chooses none of them well.
            decoding: how tokens are chosen.
        """
        with inference(self):
            latent = self.encoder(self.encoder.normalize(images), keep).tokens
            length = max_length or self.config.captions.length

            def step(ids: Tensor, rows: Tensor) -> Tensor:
                logits: Tensor = self.captions(ids, latent[rows])
                return logits[:, -1]

            return write(step, self.tokenizer, images, prefix, length, decoding)
