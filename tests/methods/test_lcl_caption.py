"""LCL writes captions: what it was trained to say after a picture."""

from __future__ import annotations

import pytest
import torch

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.sequence import pair_sequence
from altsight.losses.latent import text_targets
from altsight.methods.base import Corpus
from altsight.methods.lcl import LCL
from altsight.nn.decoding import BEAM, GREEDY
from altsight.nn.encoder import Encoder
from tests.methods.conftest import TEXTS
from tests.methods.made_documents import build


def pairs(method: LCL, batch: Batch) -> Batch:
    """Three pairs, the picture first."""
    sequences = [pair_sequence(text, method.tokenizer, method.markers, 16, 48, image_first=True) for text in TEXTS]
    tensors = {
        "image": batch["image"].unsqueeze(1),
        "images": torch.ones(3, dtype=torch.long),
        "text": torch.stack([sequence.ids for sequence in sequences]),
        "length": torch.tensor([sequence.length for sequence in sequences]),
    }
    return Batch(tensors, batch.positions, batch.samples)


def test_learned_captions_come_out_again(encoder: Encoder, corpus: Corpus, batch: Batch) -> None:
    method = build(encoder, corpus)
    data = pairs(method, batch)
    assert text_targets(data["text"], data["length"], method.markers).any()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        method.embed(data, key(0, 0)).local["generation"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for decoding in (GREEDY, BEAM):
        assert method.caption(batch["image"], max_length=99, decoding=decoding) == list(TEXTS)
    assert method.caption(batch["image"][:1], prefix="a red") == [TEXTS[0]]
    assert all(len(text) < len(TEXTS[0]) for text in method.caption(batch["image"], max_length=4))


def test_an_objective_without_generation_writes_none(encoder: Encoder, corpus: Corpus) -> None:
    method = build(encoder, corpus, objective="contrastive")
    assert not hasattr(method, "caption")
    with pytest.raises(AttributeError):
        _ = method.caption
