"""VisualGPT: a language model learns to tell what the encoder sees (Chen et al. 2022; specification 8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.views import Crop
from altsight.losses.captioning import next_token_ce_sum, target_count
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIPPrepare
from altsight.methods.mae import inference
from altsight.nn.decoding import GREEDY, Decoding, without_repeats, write
from altsight.nn.encoder import Encoder
from altsight.nn.gated import GatedConfig, GatedGPT2, VisualEncoder, language_model
from altsight.nn.init import fill, reset


class VisualGPT(Method):
    """A GPT-2, pre-trained or not, writes captions; gates weigh its own words against the image.

    L = CE of the next tokens given the image; the gates' formula is that of `altsight.nn.gated.gates`.

    The source reads 50 regions of a fixed detector; here the patch tokens of the shared encoder take their place, and
    the encoder is trained along. The source's second stage, reinforcement on CIDEr, adapts a captioner and is no
    pre-training: see `altsight transfer caption`.
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of VisualGPT."""

        language_model: str = ""
        """A GPT-2: name or folder for transformers, or a .pt file of its state; empty: start from random weights."""
        decoder: GatedConfig = field(default_factory=GatedConfig)

    drops_patches: ClassVar[bool] = True
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-4,
        lr_base_batch=0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        warmup_fraction=0.0,
        schedule="constant",
        clip_norm=1.0,
    )

    def __init__(self, config: VisualGPT.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("visualgpt")
        self.visual = VisualEncoder(config.decoder, encoder.width)
        self.decoder = GatedGPT2(config.decoder, self.tokenizer.vocab_size)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`, or from the language model.

        Raises:
            UserError: the language model cannot be loaded or does not fit.
        """
        super().init_weights(at)
        with torch_seeded(at.child("visual")):
            reset(self.visual)
            fill(self.visual, nn.init.xavier_uniform_)
        self.decoder.init_weights(at.child("decoder"))
        if self.config.language_model:
            self.decoder.load(language_model(self.config.language_model, self.config.decoder.heads))

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop and the caption's tokens."""
        return CLIPPrepare(crop, size, self.tokenizer, self.config.decoder.length)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count caption tokens."""
        return {"caption": target_count(batch["text"], self.tokenizer.end)}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the image, and predict its caption from all levels of the visual encoder."""
        encoded = self.encoder(self.encoder.normalize(batch["image"]), batch.get("visible"))
        logits = self.decoder(batch["text"][:, :-1], self.visual(encoded.patches))
        return Outputs(local={"caption": next_token_ce_sum(logits, batch["text"], self.tokenizer.end)})

    def caption(
        self, images: Tensor, max_length: int | None = None, prefix: str = "", decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8, starting with `prefix`; see MUG's.

        A word that is written twice in a row is kept once, as in the source.
        """
        length = self.config.decoder.length
        with inference(self):
            levels = self.visual(self.encoder(self.encoder.normalize(images)).patches)

            def step(ids: Tensor, rows: Tensor) -> Tensor:
                logits: Tensor = self.decoder(ids, [level[rows] for level in levels])
                return logits[:, -1]

            longest = min(max_length or length, length)
            return list(map(without_repeats, write(step, self.tokenizer, images, prefix, longest, decoding)))
