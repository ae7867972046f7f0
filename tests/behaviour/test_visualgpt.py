"""VisualGPT with 60 image-caption pairs: a language model to start from lowers the loss on captions it has not seen.

About a minute a seed on a core of its own. The source's gates are not compared with plain cross-attention here: on
made-up data the two cannot be told apart (specification 8.6).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from altsight.core.rng import key, torch_seeded
from altsight.core.types import Batch
from altsight.data.prepared import Prepared
from altsight.data.shapes import Shapes
from altsight.data.views import Crop
from altsight.losses.captioning import next_token_ce_sum, target_count
from altsight.methods.base import Corpus
from altsight.methods.visualgpt import VisualGPT
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.gated import GatedConfig
from altsight.train.accumulate import Accumulator, Embed
from tests.behaviour.conftest import prepared_shapes

pytestmark = pytest.mark.slow
PAIRS, TEXTS, LM_STEPS, HELD_OUT, LENGTH = 60, 4000, 600, 200, 16
ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=64, depth=2, heads=2)
DECODER = GatedConfig(width=64, heads=2, layers=2, length=LENGTH, visual_hidden=128)


def pretrain_language_model(data: Prepared, folder: Path, seed: int) -> None:
    """Train a small GPT-2 on captions alone, of images that the captioner never sees, and save it."""
    assert data.tokenizer is not None
    source = Shapes(TEXTS, seed=500 + seed)
    ids = data.tokenizer.encode_all([source.all_captions(i)[0] for i in range(TEXTS)], LENGTH)
    with torch_seeded(key(seed, 0, "language model")):
        config = GPT2Config(vocab_size=data.tokenizer.vocab_size, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)
        model: Any = GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(LM_STEPS):
            part = ids[torch.randint(TEXTS, (64,))]
            logits = model(part[:, :-1]).logits
            loss = next_token_ce_sum(logits, part, data.tokenizer.end) / target_count(part, data.tokenizer.end)
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / LM_STEPS)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.save_pretrained(folder)


def batch_of(method: VisualGPT, source: Shapes) -> Batch:
    prepare = method.prepare(Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False), 32)
    examples = [prepare(source.document(i, key(0, i)), key(0, i)) for i in range(len(source))]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in ("image", "text")}
    return Batch(tensors, torch.arange(len(source)), torch.arange(len(source)))


def best_held_out(data: Prepared, seed: int, language_model: str) -> float:
    """Train on 60 pairs and return the lowest loss per token on 200 others, over the epochs."""
    config = VisualGPT.Config(language_model=language_model, decoder=DECODER)
    method = VisualGPT(config, Encoder(ENCODER), Corpus(data.tokenizer))
    method.init_weights(key(seed, 0, "init"))
    train, test = batch_of(method, Shapes(PAIRS, seed)), batch_of(method, Shapes(HELD_OUT, 1000 + seed))
    accumulate = Accumulator(method, Embed(method), seed)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, weight_decay=0.0)
    best = float("inf")
    for epoch in range(60):
        method.train()
        for start in range(0, PAIRS, 20):
            part = train.part(start, start + 20)
            # The key of dropout is the first position's: another one in every step.
            part.positions = part.positions + epoch * PAIRS
            accumulate(part)
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        method.eval()
        with torch.no_grad():
            loss = method.embed(test, key(0, 0)).local["caption"] / method.counts(test)["caption"]
        best = min(best, loss.item())
    return best


def test_a_language_model_to_start_from_saves_a_fifth_of_a_nat(tmp_path: Path) -> None:
    """On average over three seeds; with every one it saves something."""
    saved = []
    for seed in range(3):
        data, folder = prepared_shapes(tmp_path, 500, seed), tmp_path / f"gpt2-{seed}"
        pretrain_language_model(data, folder, seed)
        scratch, started = best_held_out(data, seed, ""), best_held_out(data, seed, str(folder))
        print(f"seed {seed}: {scratch:.3f} nats a token from scratch, {started:.3f} from the language model")
        saved.append(scratch - started)
    assert min(saved) > 0.1
    assert sum(saved) / 3 >= 0.2
