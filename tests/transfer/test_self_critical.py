"""The second stage of a captioner: its reward is CIDEr-D, its loss that of the formula, and the reward rises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.text import train_tokenizer
from altsight.data.views import center_crop
from altsight.evals.caption_metrics import plain
from altsight.nn.encoder import Encoder
from altsight.transfer.base import FitConfig
from altsight.transfer.caption_data import CaptionedImages, open_captioned
from altsight.transfer.captioner import build_captioner
from altsight.transfer.self_critical import CiderReward, ReinforceConfig, SelfCritical
from tests.transfer.test_caption import CONFIG, ENCODER, tiny, toy_view, write_shapes

REFERENCES = [["a red fox in the snow", "a fox"], ["two dogs"], ["a red bicycle", "nobody rides it"], ["snow"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    """Eight images of which each keeps about two of its six captions."""
    table = write_shapes(tmp_path_factory.mktemp("shapes") / "train", 8, 0)
    return open_captioned(table, ("{captions[]}",), 0.4, 0)


@pytest.fixture
def method(data: CaptionedImages) -> SelfCritical:
    """Captions that were learned half."""
    encoder = Encoder(ENCODER)
    encoder.init_weights(key(0, 0, "init"))
    captioner = build_captioner(CONFIG, encoder, train_tokenizer(data.all_texts(), 300), key(0, 0, "caption"))
    batch = batch_of(data, list(range(0, len(data), 2)))
    texts = captioner.tokenizer.encode_all([data.caption(i) for i in batch.samples.tolist()], 16)
    batch.tensors["text"] = texts
    optimizer = torch.optim.AdamW((p for p in captioner.parameters() if p.requires_grad), lr=2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = captioner.embed(batch, key(0, 0)).local["caption"] / captioner.counts(batch)["caption"]
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return SelfCritical(ReinforceConfig("", CONFIG, beams=3), captioner, data).eval()


def batch_of(data: CaptionedImages, samples: list[int]) -> Batch:
    images = torch.stack([center_crop(data.document(i, key(0, i)).images[0], 32) for i in samples])
    return Batch({"image": images}, torch.arange(len(samples)), torch.tensor(samples))


def test_the_reward_is_cider_over_the_training_images() -> None:
    captions = ["a fox in snow!", "Two dogs", "a red red fox", "nobody"]
    truth = {i: plain(texts) for i, texts in enumerate(REFERENCES)}
    _, expected = Cider().compute_score(truth, {i: plain([text]) for i, text in enumerate(captions)})
    reward = CiderReward(REFERENCES)
    assert reward(captions, range(4)) == pytest.approx(expected.tolist(), abs=1e-9)
    # Any captions of any images, in parts: the weights of words stay those of the whole set.
    assert reward([captions[2], captions[0]], [2, 0]) == pytest.approx([expected[2], expected[0]], abs=1e-9)
    assert reward(captions * 3, [*range(4)] * 3) == pytest.approx(expected.tolist() * 3, abs=1e-9)


def once(text: str) -> str:
    """Return the text without a word that is the one before it."""
    words = text.split()
    return " ".join(word for i, word in enumerate(words) if i == 0 or word != words[i - 1])


def test_the_loss_is_that_of_the_formula(method: SelfCritical, data: CaptionedImages) -> None:
    batch, model = batch_of(data, [0, 9, 11]), method.captioner
    ids = method.written(batch["image"])
    assert ids.shape[:2] == (3, 3)
    total = 0.0
    for row, sample in enumerate([0, 9, 11]):
        own = [data.caption(i) for i in range(len(data)) if data.chosen[i, 0] == data.chosen[sample, 0]]
        others = sorted({int(image) for image in data.chosen[:, 0]} - {int(data.chosen[sample, 0])})
        references = [own, *([data.caption(i) for i in range(len(data)) if data.chosen[i, 0] == o] for o in others)]
        reward = CiderReward(references)
        rewards = [reward([once(model.tokenizer.decode(beam))], [0])[0] for beam in ids[row].tolist()]
        for beam, r in zip(ids[row].tolist(), rewards, strict=True):
            stop = beam.index(model.tokenizer.end) + 1 if model.tokenizer.end in beam else len(beam)
            logs = []
            for t in range(1, stop):
                scores = model.step(batch["image"])(torch.tensor([beam[:t]]), torch.tensor([row]))[0].double()
                logs.append(float((scores[beam[t]] - scores.exp().sum().log()).detach()))
            total -= (r - sum(rewards) / 3) * sum(logs) / len(logs)
    assert method.embed(batch, key(0, 0)).local["reward"].item() == pytest.approx(total, rel=1e-3, abs=1e-5)
    assert method.counts(batch)["reward"].item() == 9
    assert abs(total) > 1e-3


def test_a_beam_of_equal_rewards_moves_nothing(method: SelfCritical, data: CaptionedImages) -> None:
    batch = batch_of(data, [0])
    method.rewards = lambda ids, samples: torch.full(ids.shape[:2], 0.7)  # type: ignore[method-assign]
    method.embed(batch, key(0, 0)).local["reward"].backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert gradients and all(math.isclose(float(g.abs().max()), 0.0, abs_tol=1e-6) for g in gradients)
    assert all(p.grad is None for p in method.encoder.parameters())  # frozen


def test_the_reward_rises(method: SelfCritical, data: CaptionedImages) -> None:
    """On the training images."""
    batch = batch_of(data, list(range(0, len(data), 2)))
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=5e-4)

    def reward() -> float:
        return float(method.rewards(method.written(batch["image"])[:, :1], batch.samples).mean())

    before = reward()
    for _ in range(25):
        optimizer.zero_grad()
        (method.embed(batch, key(0, 0)).local["reward"] / method.counts(batch)["reward"]).backward()
        optimizer.step()
    print(f"mean CIDEr of the best captions: {before:.2f} before, {reward():.2f} after")
    assert reward() > before + 0.3


def test_both_stages_by_one_call(tmp_path: Path) -> None:
    paths = write_shapes(tmp_path / "train", 16, 0), write_shapes(tmp_path / "test", 4, 1)
    how = FitConfig(epochs=1, batch=16, precision="fp32", device="cpu", workers=0)
    settings = tiny(paths, length=10, fit=how, reinforce_epochs=0.5)
    results = settings(toy_view(), tmp_path / "out")
    assert results[-1].metric == "cider" and results[-1].value is not None
    first, second = (json.loads((tmp_path / "out" / part / "summary.json").read_text()) for part in (".", "reinforced"))
    assert (first["samples_seen"], second["samples_seen"]) == (96, 48)
    again = settings(toy_view(), tmp_path / "out")
    assert [r.value for r in again] == [r.value for r in results]
