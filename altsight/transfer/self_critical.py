"""A captioner's second stage: raise the CIDEr-D of its own captions (Rennie et al. 2017; specification 8.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs
from altsight.data.views import Crop
from altsight.evals.caption_metrics import plain, pycocoevalcap
from altsight.methods.base import Method
from altsight.methods.clip import CLIPPrepare
from altsight.methods.mae import inference
from altsight.methods.visualgpt import VisualGPT
from altsight.nn.caption import is_text
from altsight.nn.decoding import BEAM, all_beams, without_repeats
from altsight.transfer.caption_data import CaptionedImages
from altsight.transfer.captioner import Captioner, CaptionerConfig


@dataclass(frozen=True)
class ReinforceConfig:
    """The second stage; `weights` is the hash of the captioner that it starts from."""

    weights: str
    captioner: CaptionerConfig
    beams: int = BEAM.beams


def recipe(lr: float) -> OptimConfig:
    """Return the optimizer of the second stage: VisualGPT's, at another learning rate."""
    return replace(VisualGPT.optim, lr=lr)


class CiderReward:
    """CIDEr-D of captions, whose words count by their rarity among the references of all training images.

    Words are split by a Python tokenizer, for the references too: Java would have to start in every step.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._scorer = pycocoevalcap("cider", "cider_scorer", "CiderScorer")
        self._references = [plain(texts) for texts in references]
        counted = self._scorer()
        for texts in self._references:
            counted += ("", texts)
        counted.compute_doc_freq()
        self._frequency = counted.document_frequency

    def __call__(self, captions: Sequence[str], images: Sequence[int]) -> list[float]:
        """Return the CIDEr-D of each caption against the references of its image."""
        known, rewards = len(self._references), list[float]()
        pairs = list(zip(plain(captions), images, strict=True))
        for start in range(0, len(pairs), known):
            part = pairs[start : start + known]
            scorer = self._scorer()
            scorer.document_frequency = self._frequency
            for caption, image in part:
                scorer += (caption, self._references[image])
            # It takes the number of sets of references that it holds for that of all images.
            scorer.crefs += [[]] * (known - len(part))
            rewards += map(float, scorer.compute_cider())
        return rewards


class SelfCritical(Method):
    """Make the captions of a beam that are better than its mean likelier, and the others less likely.

    L = - (r - mean of r over the image's beam) * mean over the caption's tokens of log p, meaned over captions, where r
    is the CIDEr-D of a caption against those of its image that are learned from.
    """

    def __init__(self, config: ReinforceConfig, captioner: Captioner, data: CaptionedImages) -> None:
        super().__init__(captioner.encoder)
        self.config, self.captioner = config, captioner
        images, self._places = torch.unique(torch.from_numpy(data.chosen[:, 0]), return_inverse=True)
        references: list[list[str]] = [[] for _ in images]
        for i, place in enumerate(self._places.tolist()):
            references[place].append(data.caption(i))
        self._reward = CiderReward(references)

    def train(self, mode: bool = True) -> SelfCritical:
        """Switch to training mode as the captioner does; returns self."""
        super().train(mode)
        self.captioner.train(mode)
        return self

    def prepare(self, crop: Crop, size: int) -> CLIPPrepare:
        """Return the captioner's preparation."""
        return self.captioner.prepare(crop, size)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count captions that are written."""
        return {"reward": torch.tensor(len(batch) * self.config.beams, device=batch["image"].device)}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Write a beam of captions for each picture, and weigh their log-probabilities by their rewards."""
        ids = self.written(batch["image"])
        rewards = self.rewards(ids, batch.samples)
        advantage = rewards - rewards.mean(dim=1, keepdim=True)
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        flat, levels = ids.flatten(0, 1), self.captioner.look(batch["image"])
        logits = self.captioner.decoder(flat[:, :-1], [level[rows] for level in levels])
        # fp32 even where the decoder runs in bf16.
        chances = -F.cross_entropy(logits.float().transpose(1, 2), flat[:, 1:], reduction="none")
        words = is_text(flat, self.captioner.tokenizer.end)[:, 1:]
        means = (chances * words).sum(dim=1) / words.sum(dim=1)
        return Outputs(local={"reward": -(advantage.flatten() * means).sum()})

    def written(self, images: Tensor) -> Tensor:
        """Return the ids (B, beams, T) of the captions that a beam search keeps, without dropout."""
        model = self.captioner
        with inference(model):
            step = model.step(images)
            start = torch.full((len(images), 1), model.tokenizer.start, device=images.device)
            decoding = replace(BEAM, beams=self.config.beams)
            return all_beams(step, model.tokenizer, start, model.config.length, decoding)

    def rewards(self, ids: Tensor, samples: Tensor) -> Tensor:
        """Return the CIDEr-D (B, beams) of captions for the images of the training samples (B,)."""
        texts = [without_repeats(self.captioner.tokenizer.decode(row)) for row in ids.flatten(0, 1).tolist()]
        places = self._places[samples].repeat_interleave(ids.shape[1]).tolist()
        return torch.tensor(self._reward(texts, places), device=ids.device).view(ids.shape[:2])

    def no_weight_decay(self) -> set[str]:
        """Exempt what the captioner does."""
        return self.captioner.no_weight_decay()
