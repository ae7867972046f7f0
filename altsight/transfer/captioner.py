"""What a caption transfer trains: a decoder, and if wanted the encoder, on pictures and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.text import Tokenizer
from altsight.data.views import Crop
from altsight.losses.captioning import next_token_ce_sum, target_count
from altsight.methods.base import Method
from altsight.methods.clip import CLIPPrepare
from altsight.methods.mae import inference
from altsight.methods.visualgpt import VisualGPT
from altsight.nn.decoding import GREEDY, Continue, Decoding, without_repeats, write
from altsight.nn.encoder import Encoder
from altsight.nn.gated import Gate, GatedConfig, GatedGPT2, VisualEncoder
from altsight.nn.init import fill, reset
from altsight.nn.prefix import (
    LanguageSize,
    PrefixDecoder,
    Projector,
    check_size,
    load_language_model,
    new_language_model,
)

DecoderKind = Literal["prefix", "visualgpt"]
RECIPES: dict[DecoderKind, OptimConfig] = {
    # LLaVA-1.5's first stage (specification LCL 2.8).
    "prefix": OptimConfig(lr=1e-3, lr_base_batch=0, weight_decay=0.0, betas=(0.9, 0.999), warmup_fraction=0.03),
    "visualgpt": VisualGPT.optim,
}


@dataclass(frozen=True)
class CaptionerConfig:
    """What a captioner is, and what it sees in training; part of what its run is identified by."""

    weights: str
    """Hash of the encoder that it starts from."""
    data: str
    """Hash of the captions that it learns from."""
    vocabulary: int
    """Number of tokens."""
    decoder: DecoderKind
    language_model: str
    size: LanguageSize
    length: int
    tune_encoder: bool
    freeze_language_model: bool
    tuned_lr_scale: float
    gate: Gate
    tau: float
    crop: Crop


class Captioner(Method):
    """Predict a caption from the patch tokens of an encoder that was trained before.

    L = CE of the next tokens given the picture.

    visual: patch tokens (B, S, D) -> what the decoder reads, (B, S, W) a level. decoder: (ids (B, T), levels) -> logits
    (B, T, V).
    """

    def __init__(
        self, config: CaptionerConfig, encoder: Encoder, visual: nn.Module, decoder: nn.Module, tokenizer: Tokenizer
    ) -> None:
        super().__init__(encoder)
        self.config, self.tokenizer = config, tokenizer
        self.visual, self.decoder = visual, decoder
        if not config.tune_encoder:
            encoder.requires_grad_(False)
        if config.freeze_language_model:
            decoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Captioner:
        """Switch all but a frozen encoder to training mode; returns self."""
        super().train(mode)
        if not self.config.tune_encoder:
            self.encoder.eval()
        return self

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the preparation: one crop of its own, which leaves the picture as its caption says, and the tokens."""
        return CLIPPrepare(self.config.crop, size, self.tokenizer, self.config.length)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count caption tokens."""
        return {"caption": target_count(batch["text"], self.tokenizer.end)}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the picture, and predict its caption."""
        logits = self.decoder(batch["text"][:, :-1], self.look(batch["image"]))
        return Outputs(local={"caption": next_token_ce_sum(logits, batch["text"], self.tokenizer.end)})

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def lr_scales(self) -> dict[str, float]:
        """Return the factors of what was pre-trained: the encoder, and the language model that reads a prefix."""
        trained = self.config.decoder == "prefix" and self.config.language_model
        return dict.fromkeys(("encoder.", "decoder.") if trained else ("encoder.",), self.config.tuned_lr_scale)

    def caption(self, images: Tensor, decoding: Decoding = GREEDY) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8; a word twice in a row is kept once (VisualGPT)."""
        with inference(self):
            texts = write(self.step(images), self.tokenizer, images, "", self.config.length, decoding)
        return list(map(without_repeats, texts))

    def look(self, images: Tensor) -> list[Tensor]:
        """Return what the decoder reads of `images` (B, 3, H, W) uint8: (B, S, W) a level."""
        levels: list[Tensor] = self.visual(self.encoder(self.encoder.normalize(images)).patches)
        return levels

    def step(self, images: Tensor) -> Continue:
        """Return what continues captions of `images` by a token."""
        levels = self.look(images)

        def step(ids: Tensor, rows: Tensor) -> Tensor:
            logits: Tensor = self.decoder(ids, [level[rows] for level in levels])
            return logits[:, -1]

        return step


def build_captioner(config: CaptionerConfig, encoder: Encoder, tokenizer: Tokenizer, at: Key) -> Captioner:
    """Return a captioner on `encoder`; what no language model brings starts from `at`.

    Raises:
        UserError: the language model cannot be loaded, or the settings do not fit.
    """
    if config.length < 3:
        raise UserError(
            f"a caption of {config.length} tokens has no room for a start, a word and an end: raise --length."
        )
    if config.freeze_language_model and not config.language_model:
        raise UserError("a language model from random weights must learn: leave --freeze-language-model away.")
    make = _prefix if config.decoder == "prefix" else _visualgpt
    visual, decoder = make(config, encoder, tokenizer, at)
    return Captioner(config, encoder, visual, decoder, tokenizer)


def _prefix(
    config: CaptionerConfig, encoder: Encoder, tokenizer: Tokenizer, at: Key
) -> tuple[Projector, PrefixDecoder]:
    length = encoder.num_patches + config.length
    if config.language_model:
        model = load_language_model(config.language_model, length)
    else:
        model = new_language_model(config.size, tokenizer, length, at.child("language model"))
    decoder = PrefixDecoder(model, tokenizer)
    visual = Projector(encoder.width, decoder.width)
    visual.init_weights(at.child("projector"))
    return visual, decoder


def _visualgpt(
    config: CaptionerConfig, encoder: Encoder, tokenizer: Tokenizer, at: Key
) -> tuple[VisualEncoder, GatedGPT2]:
    if config.freeze_language_model:
        raise UserError("VisualGPT's gates lie inside of its language model: leave --freeze-language-model away.")
    size, model = config.size, None
    if config.language_model:
        model = load_language_model(config.language_model, config.length)
        if model.config.model_type != "gpt2":
            raise UserError(
                f"the language model '{config.language_model}' is a {model.config.model_type}, and VisualGPT is made "
                "of a GPT-2: use --decoder prefix."
            )
        size = LanguageSize(model.config.n_embd, model.config.n_head, model.config.n_layer)
    check_size(size)
    gated = GatedConfig(
        size.width,
        size.heads,
        size.layers,
        config.length,
        # The source's 2048 beside 768.
        visual_hidden=8 * size.width // 3,
        gate=config.gate,
        tau=config.tau,
    )
    decoder = GatedGPT2(gated, tokenizer.vocab_size)
    decoder.init_weights(at.child("decoder"))
    if model is not None:
        decoder.load(model.state_dict())
    visual = VisualEncoder(gated, encoder.width)
    with torch_seeded(at.child("visual")):
        reset(visual)
        fill(visual, nn.init.xavier_uniform_)
    return visual, decoder
