"""M3AE: one masked autoencoder over the patches and the words of a pair (Geng et al. 2022; specification A8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, torch_seeded
from altsight.core.types import Batch, Document, Example, Outputs
from altsight.data.text import Tokenizer
from altsight.data.views import Crop, random_keep
from altsight.losses.pixels import masked_mse_sum, patchify
from altsight.losses.tokens import token_ce_sum
from altsight.methods.base import Corpus, Method
from altsight.methods.mae import MAEPrepare, inference
from altsight.methods.simmim import fill_in
from altsight.nn.decoder import PixelDecoderConfig
from altsight.nn.encoder import Encoder
from altsight.nn.multimodal import JointDecoder, sincos_1d


@dataclass(frozen=True)
class M3AEPrepare:
    """MAE's image and keep, and text: (T,) int64, keep_text: (M,) int64. None without an image or a text.

    The text is words and padding: no start, no end. The words that stay visible are drawn among all places, padding
    included, so that they are equally many for every text.
    """

    masked: MAEPrepare
    tokenizer: Tokenizer
    length: int
    mask_ratio: float

    def __call__(self, document: Document, at: Key) -> Example | None:
        example = self.masked(document, at) if document.texts else None
        if example is None:
            return None
        ids = self.tokenizer.model.encode(document.texts[0], add_special_tokens=False).ids[: self.length]
        example["text"] = torch.tensor(ids + [self.tokenizer.pad] * (self.length - len(ids)))
        example["keep_text"] = random_keep(self.length, self.mask_ratio, at.child("text"))
        return example


class M3AE(Method):
    """Multi-modal masked autoencoder: the shared encoder runs over visible patches and visible words together.

    L = image_weight * MSE of the masked patches' pixels + text_weight * CE of the masked words.

    Words carry a learned modality embedding. The source's one of patches would only add to the bias of the patch
    embedding, so it is left to that: the encoder stays the shared one, and encodes images alone afterwards.
    The source trains at 256 x 256 pixels (--encoder.img-size 256).
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of M3AE at the values of its released command."""

        mask_ratio: float = 0.75
        text_mask_ratio: float = 0.75
        length: int = 64
        """Longest text in tokens."""
        image_weight: float = 1.0
        text_weight: float = 0.5
        decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1.5e-4, lr_base_batch=256, weight_decay=0.05, betas=(0.9, 0.95), warmup_fraction=5 / 100
    )
    masked: ClassVar[bool] = True

    def __init__(self, config: M3AE.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("m3ae")
        _check_ratio(encoder.num_patches, config.mask_ratio, "patches", "mask-ratio")
        _check_ratio(config.length, config.text_mask_ratio, "words", "text-mask-ratio")
        self.text_embedding = nn.Embedding(self.tokenizer.vocab_size, encoder.width)
        self.text_type = nn.Parameter(torch.empty(1, 1, encoder.width))
        self.text_positions = nn.Parameter(torch.empty(config.length, encoder.width), requires_grad=False)
        self.decoder = JointDecoder(config.decoder, encoder, config.length, self.tokenizer.vocab_size)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`: words N(0, 1), their type N(0, 0.02), fixed positions."""
        super().init_weights(at)
        self.decoder.init_weights(at.child("decoder"))
        with torch_seeded(at.child("text")), torch.no_grad():
            nn.init.normal_(self.text_embedding.weight)
            nn.init.normal_(self.text_type, std=0.02)
            self.text_positions.copy_(sincos_1d(self.encoder.width, self.config.length))

    def prepare(self, crop: Crop, size: int) -> M3AEPrepare:
        """Return the preparation: MAE's crop and mask, the words and which of them are visible, for every sample."""
        config = self.config
        masked = MAEPrepare(crop, size, self.encoder.patches_at(size), config.mask_ratio)
        return M3AEPrepare(masked, self.tokenizer, config.length, config.text_mask_ratio)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count masked patches, and masked words that are no padding."""
        return {"pixels": self._masked_patches(batch).sum(), "text": self._masked_words(batch).sum()}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Encode the visible patches and words together, decode all, compare the masked ones."""
        images = self.encoder.normalize(batch["image"])
        pixels, states = self._decode(batch, images)
        target = patchify(images, self.encoder.patch_size)
        # Wherever a word is hidden, padding among them, which does not count: equally many of every text, so that no
        # shape depends on the texts.
        places = _others(batch["keep_text"], self.config.length)
        words = batch["text"].gather(1, places)
        logits = self.decoder.words(states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1])))
        return Outputs(
            local={
                "pixels": masked_mse_sum(pixels, target, self._masked_patches(batch)),
                "text": token_ce_sum(logits, words, words != self.tokenizer.pad),
            }
        )

    def _decode(self, batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder makes of all patches and words."""
        ids, keep, keep_text = batch["text"], batch["keep"], batch["keep_text"]
        padding = ids == self.tokenizer.pad
        words = self.text_embedding(ids.gather(1, keep_text)) + self.text_positions[keep_text] + self.text_type
        encoded, text = self.encoder.forward_with(images, keep, words, padding.gather(1, keep_text))
        grid = (images.shape[2] // self.encoder.patch_size, images.shape[3] // self.encoder.patch_size)
        return self.decoder(encoded.tokens, keep, text, keep_text, padding, grid)

    def _masked_patches(self, batch: Batch) -> Tensor:
        """Return (B, L) bool, True where the patch is not visible."""
        return _hidden(batch["keep"], self.encoder.patches_at(self.encoder.input_size))

    def _masked_words(self, batch: Batch) -> Tensor:
        """Return (B, T) bool, True where a word is not visible; never at padding."""
        return _hidden(batch["keep_text"], self.config.length) & (batch["text"] != self.tokenizer.pad)

    def weights(self) -> dict[str, float]:
        """Return the weights of the two losses."""
        return {"pixels": self.config.image_weight, "text": self.config.text_weight}

    def no_weight_decay(self) -> set[str]:
        """Exempt class token, mask tokens, modality embeddings and the table of words, as the source does."""
        own = {"text_embedding.weight", "text_type", "decoder.mask_tokens", "decoder.types"}
        return own | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the images of `batch` with their masked patches as predicted: (B, 3, H, W) fp32 in [0, 1]."""
        with inference(self):
            images = self.encoder.normalize(batch["image"])
            return fill_in(self._decode(batch, images)[0], images, self._masked_patches(batch), self.encoder)


def _hidden(keep: Tensor, length: int) -> Tensor:
    """Return (B, length) bool from `keep` (B, K): True where it does not point."""
    return torch.ones(len(keep), length, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


def _others(keep: Tensor, length: int) -> Tensor:
    """Return the places (B, length - K) to which `keep` (B, K) does not point, in order."""
    order = _hidden(keep, length).int().argsort(dim=1, descending=True, stable=True)
    return order[:, : length - keep.shape[1]]


def _check_ratio(length: int, ratio: float, what: str, setting: str) -> None:
    if not 0 < int(length * (1 - ratio)) < length:
        raise UserError(
            f"a mask ratio of {ratio:g} must leave some of the {length} {what} visible and some masked: change "
            f"--method.{setting}."
        )
