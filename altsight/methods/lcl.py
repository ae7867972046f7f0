"""LCL: learn from interleaved documents by compressing each picture into what the text around it needs.

Yang et al. 2024, "Vision Model Pre-training on Interleaved Image-Text Data via Latent Compression Learning", arXiv
2406.07543 (specification LCL). One causal language model reads text and pictures. It predicts the text (generation),
and what it has read before a picture is matched with that picture (contrast), which keeps pictures from becoming
alike: they would be easy to predict then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs, Progress
from altsight.data.sequence import Markers
from altsight.data.views import Crop
from altsight.losses.latent import context_loss, regression_sum, text_targets
from altsight.methods.base import Corpus, Method, Samples
from altsight.methods.mae import inference
from altsight.methods.sequences import SequencePrepare
from altsight.nn.decoding import GREEDY, Decoding, write
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.interleaved import ContextReader, LanguageConfig, LanguageModel, NormedMap, Project


class LCL(Method):
    """Latent compression learning, and the objectives that its Table 1 compares it with.

    The CLS token and registers of the encoder are dropped after its last norm: the language model reads the patch
    tokens, each through one map. `embed_image` pools them by attention; the features are read at `feature_point`,
    their mean, like those of every other method. The source's crop is Crop(scale=(0.9, 1.0), flip=False).
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of LCL at the released values for ViT-B/16."""

        language: LanguageConfig = field(default_factory=LanguageConfig)
        data: Literal["auto", "interleaved", "paired"] = "auto"
        """auto: every sample is read as the pair or the document that it is. interleaved and paired are refused where
        there are no documents, or where there are any."""
        sequence: int = 2048
        """Longest sequence in tokens, pictures included: the source's for documents; it has 280 for pairs. No batch
        costs more than its own longest."""
        max_images: int = 6
        """Pictures of a document that are used: the first ones."""
        image_first: float = 0.5
        """Probability that the picture of a pair stands before its text."""
        objective: Literal["lcl", "generation", "generation_regression", "contrastive"] = "lcl"
        """lcl: generation and contrast. generation: text alone (Flamingo). generation_regression: text, and each token
        of a picture from what precedes it, with no gradient stopped (Emu). In the source's Table 1 both collapse."""
        generation_weight: float = 1.0
        contrastive_weight: float = 0.1
        regression_weight: float = 1.0
        """[unconfirmed], as is all of the regression: mean squared error of a layer norm and a linear map."""
        temperature: float = 0.07
        """What the cosines are divided by at the start; learned from there."""
        max_scale: float = 100.0
        """Largest inverse temperature."""
        context: int = 77
        """Longest text, start and end included, where texts are compared with images (zero-shot, retrieval)."""

    # LAION-400M: 2,000 warm-up steps of 32 epochs x 400 M pairs / 32,768, the batch [unconfirmed]. MMC4: lr 3e-4.
    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=5e-4,
        lr_base_batch=0,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        eps=1e-6,
        warmup_fraction=2000 * 32768 / (32 * 400e6),
    )
    shares: ClassVar[bool] = True
    least_batch: ClassVar[int] = 2

    text: ContextReader | None

    def __init__(self, config: LCL.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        self.tokenizer = corpus.need_tokenizer("lcl")
        self.markers = Markers.after(self.tokenizer)
        self.samples = _samples(config, corpus)
        if encoder.num_patches + 4 > config.sequence:
            raise UserError(
                f"a picture of {encoder.num_patches} tokens and its marks do not fit into a sequence of "
                f"{config.sequence}: set --method.sequence {encoder.num_patches + 4} or more."
            )
        generates, contrasts = config.objective != "contrastive", config.objective in ("lcl", "contrastive")
        width = config.language.width
        # What an objective does not use does not exist: every parameter has a gradient.
        self.language = LanguageModel(config.language, self.tokenizer.vocab_size + 3, config.sequence)
        self.project = Project(encoder.width, width, config.language.heads, pool=contrasts)
        self.head = NormedMap(width, self.tokenizer.vocab_size + 3) if generates else None
        self.regression = NormedMap(width, width) if config.objective == "generation_regression" else None
        self.context_head = NormedMap(width, width) if contrasts else None
        self.logit_scale = nn.Parameter(torch.empty(())) if contrasts else None
        self.shares = contrasts  # type: ignore[misc]  # that of this very method
        if self.context_head is not None:
            context = min(config.context, config.sequence)
            self.text = ContextReader(self.language, self.context_head, self.tokenizer, self.markers, context)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`."""
        super().init_weights(at)
        self.language.init_weights(at.child("language"))
        self.project.init_weights(at.child("project"))
        if self.head is not None:
            self.head.init_weights(at.child("head"))
        if self.regression is not None:
            self.regression.init_weights(at.child("regression"))
        if self.context_head is not None:
            # CLIP's text projection; the other two start as linear layers do.
            self.context_head.init_weights(at.child("context"), std=self.config.language.width**-0.5)
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, -math.log(self.config.temperature))

    def prepare(self, crop: Crop, size: int) -> SequencePrepare:
        """Return the preparation: crops of the pictures, and the sequence of the text and their places."""
        config = self.config
        return SequencePrepare(
            crop,
            size,
            self.tokenizer,
            self.encoder.patches_at(size),
            config.sequence,
            1 if self.samples == "pairs" else config.max_images,
            config.image_first,
            self.samples,
        )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the text to be predicted, and the tokens of pictures."""
        counts = {}
        if self.head is not None:
            counts["generation"] = text_targets(batch["text"], batch["length"], self.markers).sum()
        if self.regression is not None:
            counts["regression"] = (batch["text"] == self.markers.image).sum()
        return counts

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Read the sequences once.

        shared: image and context (n, W), for each picture that has anything before it. local: the sums over text
        tokens and, where they are regressed, over picture tokens.
        """
        lengths = batch["length"]
        # What lies behind the longest sequence is padding, which nothing before it sees.
        ids = batch["text"][:, : int(lengths.max())]
        latents, pooled = self.project(self._encode(batch).patches)
        places = ids == self.markers.image
        x = self.language.token_embedding(ids)
        states = self.language(x.masked_scatter(places.unsqueeze(-1), latents.to(x.dtype)))
        out = Outputs()
        if self.context_head is not None and pooled is not None:
            starts = ids == self.markers.start_of_image
            known = starts & (torch.arange(ids.shape[1], device=ids.device) > 0)
            # Starts and pictures are in the same order: that of the samples, and of reading.
            out.shared = {"image": pooled[known[starts]], "context": self.context_head(states[known])}
        if self.head is not None:
            wanted = text_targets(ids, lengths, self.markers)
            logits = self.head(states[:, :-1][wanted])
            out.local["generation"] = F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum")
        if self.regression is not None:
            predicted = self.regression(states[:, :-1][places[:, 1:]])
            out.local["regression"] = regression_sum(predicted, latents.flatten(0, 1))
        return out

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of the contrastive loss, where the objective has one."""
        if self.logit_scale is None:
            return {}
        return {"contrastive": context_loss(shared["image"], shared["context"], self.logit_scale.exp())}

    def weights(self) -> dict[str, float]:
        """Return the weights of the losses that the objective has."""
        weights = {}
        if self.head is not None:
            weights["generation"] = self.config.generation_weight
        if self.regression is not None:
            weights["regression"] = self.config.regression_weight
        if self.logit_scale is not None:
            weights["contrastive"] = self.config.contrastive_weight
        return weights

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the pooled vectors (B, W), un-normalised: what contexts are compared with."""
        pooled = self.project(encoded.patches)[1]
        assert pooled is not None, "only an objective with contrast has a joint space"
        return pooled

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens, vectors in the source; position tables and the pooling query decay there."""
        names = self.encoder.no_weight_decay()
        return {f"encoder.{name}" for name in names if not name.endswith("pos_embed")}

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        """Keep the scale between 1 and `max_scale`."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def report(self) -> dict[str, float]:
        """Return the inverse temperature, where there is one."""
        return {} if self.logit_scale is None else {"scale": self.logit_scale.exp().item()}

    @property
    def caption(self) -> Callable[..., list[str]]:
        """The captioner; AttributeError for the objective that learns to write nothing."""
        if self.head is None:
            raise AttributeError(f"{self.config.objective} writes no captions")
        return self._caption

    def _caption(
        self, images: Tensor, max_length: int | None = None, prefix: str = "", decoding: Decoding = GREEDY
    ) -> list[str]:
        """Return a caption for each of `images` (B, 3, H, W) uint8, starting with `prefix`; see MUG's.

        The text follows the picture, as in pairs whose picture stands first: without a start token.
        """
        head, marks = self.head, self.markers
        assert head is not None
        with inference(self):
            latents = self.project(self.encoder(self.encoder.normalize(images)).patches)[0]
            edges = torch.tensor([marks.start_of_image, marks.end_of_image], device=images.device)
            first, last = self.language.token_embedding(edges).expand(len(images), 2, -1).split(1, dim=1)
            picture = torch.cat([first, latents.to(first.dtype), last], dim=1)

            def step(ids: Tensor, rows: Tensor) -> Tensor:
                words = self.language.token_embedding(ids[:, 1:])
                states = self.language(torch.cat([picture[rows], words], dim=1))
                # Marks of pictures are no text.
                return head(states[:, -1])[:, : self.tokenizer.vocab_size]

            # Without the start token one more id fits than the sequence has.
            room = self.config.sequence - picture.shape[1] + 1
            longest = min(max_length or self.config.context, room)
            return write(step, self.tokenizer, images, prefix, longest, decoding)

    def _encode(self, batch: Batch) -> Encoded:
        """Encode the pictures of all samples, one after the other, without the padding behind them."""
        images = batch["image"]
        there = torch.arange(images.shape[1], device=images.device) < batch["images"].unsqueeze(1)
        return self.encoder(self.encoder.normalize(images[there]))


def _samples(config: LCL.Config, corpus: Corpus) -> Samples:
    """Return what the samples are to be read as; UserError where the data are not what the configuration asks for."""
    if config.data == "interleaved" and corpus.samples == "pairs":
        raise UserError(
            "--method.data interleaved needs documents, and the data set has only image-text pairs: prepare documents "
            "(MMC4, OBELICS), or set --method.data auto."
        )
    if config.data == "paired" and corpus.samples in ("documents", "mixed"):
        raise UserError(
            "--method.data paired needs image-text pairs, and the data set has interleaved documents: prepare them "
            "with --as-pairs, or set --method.data auto."
        )
    return "pairs" if config.data == "paired" else corpus.samples
