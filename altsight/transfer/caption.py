"""Captions from any encoder: a prefix for a language model (specification LCL 2.8), or VisualGPT's decoder (8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from altsight.core.config import OptimConfig, write_json
from altsight.core.dist import world
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepare import read_pairs
from altsight.data.samples import locate
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.data.views import Crop
from altsight.evals.base import Result, Split, View
from altsight.evals.caption_metrics import METRICS, CaptionMetric, pycocoevalcap
from altsight.evals.captions import Captioned, score_captions, write_captions
from altsight.nn.decoding import BEAM, Decoding
from altsight.nn.gated import Gate
from altsight.nn.prefix import LanguageSize, language_tokenizer
from altsight.nn.resample import resized
from altsight.train.run import weights_hash
from altsight.transfer.base import FitConfig, fit, keep_encoder, prepared_for, with_view
from altsight.transfer.caption_data import CaptionedImages, open_captioned
from altsight.transfer.captioner import RECIPES, Captioner, CaptionerConfig, DecoderKind, build_captioner
from altsight.transfer.self_critical import ReinforceConfig, SelfCritical, recipe


@dataclass(frozen=True)
class Caption:
    """Train a decoder to say what an encoder sees, write captions of other images, and score them."""

    data: str
    """Images with captions to learn from, in any layout that `altsight prepare` takes, or samples:NAME/train."""
    test: str
    """Images to caption; where they have captions, these are what is scored against."""
    captions: tuple[str, ...] = ("{txt}",)
    """Templates of the captions of both, over the fields of a sample; "{captions[]}" for a list."""
    decoder: DecoderKind = "prefix"
    """prefix: an MLP maps patch tokens to tokens that a language model reads before the text. visualgpt: a GPT-2 with
    gated cross-attention."""
    language_model: str = ""
    """Folder (or name on the hub) of a causal language model of transformers and its tokenizer; empty: one from random
    weights, with a tokenizer that is trained on the captions."""
    size: LanguageSize = field(default_factory=LanguageSize)
    """Of a language model from random weights."""
    vocab_size: int = 8192
    """Largest vocabulary of a tokenizer that is trained here."""
    length: int = 40
    """Longest caption in tokens, start and end included."""
    tune_encoder: bool = False
    """Train the encoder along; what it became lies in encoder.safetensors."""
    freeze_language_model: bool = False
    """Train the MLP alone, as in LLaVA's first stage."""
    fraction: float = 1.0
    """Share of the captions that is learned from (VisualGPT: 0.001, 0.005 and 0.01 of COCO's)."""
    lr: float = 0.0
    """Peak learning rate; 0: the source's, 1e-3 for prefix (LLaVA) and 1e-4 for visualgpt."""
    tuned_lr_scale: float = 0.02
    """Factor on it for what is tuned: the encoder, and a given language model behind a prefix (LLaVA: 2e-5 to 1e-3)."""
    gate: Gate = "srau"
    """VisualGPT's; see `altsight.nn.gated`."""
    tau: float = 0.2
    """Below it a gate is shut."""
    crop: Crop = field(default_factory=lambda: Crop(scale=(0.9, 1.0), flip=False))
    """In training. Captions name sides, so nothing is mirrored."""
    decoding: Decoding = BEAM
    metrics: tuple[CaptionMetric, ...] = METRICS
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=10, batch=50))
    reinforce_epochs: float = 0.0
    """Epochs of a second stage that raises the captions' CIDEr-D itself (self-critical training, as in VisualGPT)."""
    reinforce_lr: float = 1e-5

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return the metrics of the test images' captions, and write these to captions.json.

        The same call with another `test` or `decoding` writes other captions without training again.

        Raises:
            UserError: the data, the language model or a setting cannot be used; nothing has been written then.
        """
        if self.metrics:
            pycocoevalcap("cider", "cider", "Cider")  # where it is missing, say so before the training
        train = open_captioned(self.data, self.captions, self.fraction, self.fit.seed)
        split = Split("test", read_pairs(locate(self.test), self.captions))
        if not len(split):
            raise UserError(f"'{self.test}' has no images: give --test some to caption.")
        tokenizer = self._tokenizer(train)
        config, at = self._config(view, train, tokenizer), key(self.fit.seed, 0, "caption")
        model = fit(
            "caption",
            lambda: build_captioner(config, resized(view.encoder), tokenizer, at),
            config,
            self._optim(),
            self.fit,
            replace(prepared_for(train, Path(self.data), train.digest), tokenizer=tokenizer),
            out,
        )
        assert isinstance(model, Captioner)
        if self.reinforce_epochs:
            model = self._reinforced(model, train, out / "reinforced")
        if self.tune_encoder:
            keep_encoder(view, model.encoder, out)
        captioner = with_view(view, model.encoder, caption=model.caption, batch_size=self.fit.batch)
        written = write_captions(captioner, split, self.decoding)
        if world().is_main:
            write_json(out / "captions.json", [_shown(one) for one in written])
        if not any(one.references for one in written):
            return [self._unscored(captioner, written)]
        return [
            self._seeded(r) for r in score_captions(captioner, "caption", split, written, self.decoding, self.metrics)
        ]

    def _reinforced(self, model: Captioner, train: CaptionedImages, out: Path) -> Captioner:
        config = ReinforceConfig(weights_hash(model), model.config)
        data = prepared_for(train, Path(self.data), train.digest)
        how = replace(self.fit, epochs=self.reinforce_epochs)
        better = fit(
            "caption", lambda: SelfCritical(config, model, train), config, recipe(self.reinforce_lr), how, data, out
        )
        assert isinstance(better, SelfCritical)
        return better.captioner

    def _tokenizer(self, train: CaptionedImages) -> Tokenizer:
        if self.language_model:
            return language_tokenizer(self.language_model)
        return train_tokenizer(train.all_texts(), self.vocab_size)

    def _optim(self) -> OptimConfig:
        found = RECIPES[self.decoder]
        return replace(found, lr=self.lr or found.lr)

    def _config(self, view: View, train: CaptionedImages, tokenizer: Tokenizer) -> CaptionerConfig:
        return CaptionerConfig(
            weights=weights_hash(view.encoder),
            data=train.digest,
            vocabulary=tokenizer.vocab_size,
            decoder=self.decoder,
            language_model=self.language_model,
            size=self.size,
            length=self.length,
            tune_encoder=self.tune_encoder,
            freeze_language_model=self.freeze_language_model,
            tuned_lr_scale=self.tuned_lr_scale,
            gate=self.gate,
            tau=self.tau,
            crop=self.crop,
        )

    def _seeded(self, result: Result) -> Result:
        """Return the result with the seed of the training; that of the decoding is among its settings."""
        return replace(result, extra=result.extra | {"seed": self.fit.seed, "decoder": self.decoder})

    def _unscored(self, view: View, written: Sequence[Captioned]) -> Result:
        note = "not applicable: the test images have no captions; those that were written are in captions.json"
        return Result(
            "caption", "captions", "cider", None, n=len(written), preprocess=view.preprocess.hash(), note=note
        )


def _shown(one: Captioned) -> dict[str, str | list[str]]:
    return {"image": one.image, "caption": one.caption, "references": list(one.references)}
