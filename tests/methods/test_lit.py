"""LiT's loss against loops over the formula; the image tower is locked, and comes from elsewhere or is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel

from altsight.core.config import to_dict
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Progress
from altsight.data.views import Crop
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIP
from altsight.methods.dino import DINO
from altsight.methods.lit import LiT
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig
from altsight.train.optim import make_optimizer, parameter_groups

CONFIG = LiT.Config(text=TextConfig(width=32, heads=2, layers=1, context=16))


def make(encoder: Encoder, corpus: Corpus, **settings: Any) -> LiT:
    method = LiT(dataclasses.replace(CONFIG, **settings), encoder, corpus)
    method.init_weights(key(0, 0, "init"))
    return method


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> LiT:
    return make(encoder, corpus)


def slow_loss(image: list[list[float]], text: list[list[float]], scale: float) -> float:
    """Both cross-entropies, from un-normalised features, pair by pair."""
    total = 0.0
    for mine, other in ((image, text), (text, image)):
        for i, u in enumerate(mine):
            logits = []
            for v in other:
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                logits.append(scale * dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v)))
            total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return total / (2 * len(image))


def test_loss_equals_reference(method: LiT, batch: Batch) -> None:
    shared = method.embed(batch, key(0, 0)).shared
    assert {name: tuple(x.shape) for name, x in shared.items()} == {"image": (3, 32), "text": (3, 32)}
    expected = slow_loss(shared["image"].tolist(), shared["text"].tolist(), 10)
    assert method.loss(shared)["contrastive"].item() == pytest.approx(expected, rel=1e-5)
    assert method.report()["scale"] == pytest.approx(10)


@pytest.mark.parametrize("feature", ["mean", "cls"])
def test_image_is_the_encoders_own_feature(encoder: Encoder, corpus: Corpus, batch: Batch, feature: str) -> None:
    method = make(encoder, corpus, image_feature=feature)
    tokens = encoder(encoder.normalize(batch["image"])).tokens
    expected = tokens[:, 0] if feature == "cls" else tokens[:, 3:].mean(dim=1)  # 1 CLS, 2 registers
    torch.testing.assert_close(method.embed(batch, key(0, 0)).shared["image"], expected)
    assert method.image_projection is None, "no map on the locked tower"


def test_image_tower_stays_as_it_is(corpus: Corpus, batch: Batch) -> None:
    """No gradient, no drop path in training mode, no change by steps; everything else moves."""
    config = EncoderConfig("vit_tiny_patch16_224", 32, 8, width=32, depth=2, heads=2, drop_path=0.5)
    method = make(Encoder(config), corpus).train()
    assert not any(module.training for module in method.encoder.modules()) and method.text.training
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = make_optimizer(method, LiT.optim, 3)
    for step in range(2):
        shared = method.embed(batch, key(0, 0)).shared
        assert not shared["image"].requires_grad and shared["text"].requires_grad
        method.loss(shared)["contrastive"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        method.after_step(Progress(step, 2))
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("encoder."), name
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in method.named_parameters() if p.grad is not None}
    assert trained == {name for name in before if not name.startswith("encoder.")}
    method.eval()
    assert not method.text.training


def test_batch_norm_of_a_locked_net_stays_as_it_is(corpus: Corpus, batch: Batch) -> None:
    method = make(Encoder(EncoderConfig("resnet18", img_size=32)), corpus).train()
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    method.embed(batch, key(0, 0))
    assert all(torch.equal(value, before[name]) for name, value in method.encoder.state_dict().items())


def test_decay_groups(method: LiT) -> None:
    """Only maps decay."""
    groups = parameter_groups(method, LiT.optim)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    grouped = {id(p) for g in groups for p in g["params"]}
    names = {name: p for name, p in method.named_parameters() if id(p) in grouped}
    exempt = {name for name, p in names.items() if p.ndim > 1 and id(p) not in decayed}
    assert exempt == {"text.positional_embedding", "text.token_embedding.weight"}
    assert not any(name.startswith("encoder.") for name in names)


def save_run(directory: Path, name: str, method: Method, ema: Method | None = None) -> Path:
    """Write what of a run's folder LiT reads: two checkpoints, of which the second is the newest."""
    (directory / "checkpoints").mkdir(parents=True)
    run = {"name": name, "encoder": to_dict(method.encoder.config)}
    (directory / "run.json").write_text(json.dumps(run))
    old = {part: torch.zeros_like(value) for part, value in method.state_dict().items()}
    for samples, state in ((100, old), (200, method.state_dict())):
        path = directory / f"checkpoints/samples_{samples:012d}.pt"
        torch.save({"method": state, "ema": None if ema is None else ema.state_dict()}, path)
        path.with_suffix(".json").write_text("{}")
    (directory / "checkpoints/samples_000000000300.pt").write_bytes(b"cut short")
    return directory


def other_encoder(**settings: Any) -> Encoder:
    """An encoder like the fixture's, from another seed."""
    config = EncoderConfig("vit_tiny_patch16_224", 32, 8, width=32, depth=2, heads=2, registers=2)
    encoder = Encoder(dataclasses.replace(config, **settings))
    encoder.init_weights(key(9, 9))
    return encoder


def assert_locked_to(method: LiT, expected: Encoder) -> None:
    mine = method.encoder.state_dict()
    assert mine.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, mine[name]) for name, value in expected.state_dict().items())


def clip_of(encoder: Encoder, corpus: Corpus, seed: int) -> CLIP:
    method = CLIP(CLIP.Config(text=CONFIG.text, embed_dim=24), encoder, corpus)
    method.init_weights(key(seed, 0))
    return method


def test_locks_the_newest_whole_checkpoint_of_a_run(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    trained = clip_of(other_encoder(), corpus, 5)
    folder = save_run(tmp_path / "run", "clip", trained)
    assert_locked_to(make(encoder, corpus, locked=str(folder)), trained.encoder)
    averaged = clip_of(other_encoder(), corpus, 6)
    folder = save_run(tmp_path / "averaged", "clip", trained, averaged)
    assert_locked_to(make(encoder, corpus, locked=str(folder)), averaged.encoder)


def test_locks_the_teacher_where_that_is_evaluated(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(DINO.Config().head, hidden=16, bottleneck=8, prototypes=16)
    dino = DINO(dataclasses.replace(DINO.Config(), head=config), other_encoder(), corpus)
    dino.init_weights(key(5, 0))
    with torch.no_grad():
        for parameter in dino.encoder.parameters():
            parameter.add_(1)
    method = make(encoder, corpus, locked=str(save_run(tmp_path / "run", "dino", dino)))
    assert dino.evaluated is not dino.encoder
    assert_locked_to(method, dino.evaluated)


@pytest.mark.parametrize("names", ["backbone.", "encoder.backbone.", ""])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_locks_a_file(encoder: Encoder, corpus: Corpus, tmp_path: Path, names: str, kind: str) -> None:
    """Of an encoder, of a method, or of timm's model, by what the names begin with."""
    expected, path = other_encoder(), tmp_path / f"weights.{kind}"
    state = {name.replace("backbone.", names, 1): value for name, value in expected.state_dict().items()}
    if names.startswith("encoder"):
        state["text.word"] = torch.zeros(3)
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    method = make(encoder, corpus, locked=str(path))
    assert_locked_to(method, expected)
    drawn = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        for value in method.state_dict().values():
            value.fill_(math.nan)
    method.init_weights(key(0, 0, "init"))
    assert all(torch.equal(value, drawn[name]) for name, value in method.state_dict().items())


def test_a_finished_run_needs_no_file(encoder: Encoder, corpus: Corpus, batch: Batch, tmp_path: Path) -> None:
    """Its checkpoint has the weights: built without `init_weights`, it takes them from there."""
    path = tmp_path / "weights.pt"
    torch.save(other_encoder().state_dict(), path)
    trained = make(encoder, corpus, locked=str(path))
    path.unlink()
    loaded = LiT(trained.config, Encoder(encoder.config), corpus)
    loaded.load_state_dict(trained.state_dict())
    for name, value in trained.embed(batch, key(0, 0)).shared.items():
        assert torch.equal(value, loaded.embed(batch, key(0, 0)).shared[name])
    with pytest.raises(UserError, match=r"no weights at .*weights\.pt"):
        loaded.init_weights(key(0, 0))


def test_weights_that_do_not_fit(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    """Of another width, as a teacher may be; of another depth; of another input. Each in one line, before training."""

    def refused(theirs: Encoder, name: str) -> str:
        folder = save_run(tmp_path / name, "clip", clip_of(theirs, corpus, 0))
        with pytest.raises(UserError) as error:
            make(encoder, corpus, locked=str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "are of an encoder 48 wide, and this one is 32 wide" in refused(other_encoder(width=48), "width")
    assert "'backbone.blocks.2." in refused(other_encoder(depth=3), "depth")
    assert "--encoder.normalization half, and this one has imagenet" in refused(
        other_encoder(normalization="half"), "normalization"
    )
    assert "--encoder.heads 4, and this one has 2" in refused(other_encoder(heads=4), "heads")
    path = tmp_path / "wide.pt"
    torch.save(other_encoder(width=48).state_dict(), path)
    with pytest.raises(UserError, match="an encoder 48 wide, and this one is 32 wide"):
        make(encoder, corpus, locked=str(path))


def test_weights_that_are_none(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "run").mkdir()
    for name, expected in (
        ("nowhere", "there are no weights at"),
        ("text.pt", "cannot be read"),
        ("text.safetensors", "cannot be read"),
        ("list.pt", "holds no weights by name"),
        ("run", "has no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            make(encoder, corpus, locked=str(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_timms_weights(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by the encoder's model; refused where the encoder normalises images otherwise, or without a network."""
    usual, expected = timm.create_model, other_encoder(width=192, depth=12, heads=3, patch_size=16, registers=0)

    def fetched(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        model = usual(name, **arguments)
        if pretrained:
            assert name == "vit_tiny_patch16_224" and arguments == {"num_classes": 0, "img_size": 32}
            model.load_state_dict(expected.backbone.state_dict())
        return model

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no route to host\nand more")
        return usual(name, **arguments)

    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, normalization="half")
    monkeypatch.setattr(timm, "create_model", fetched)
    assert_locked_to(make(Encoder(config), corpus, locked="timm"), expected)
    with pytest.raises(UserError, match=r"expect images of mean \(0.5.*set --encoder.normalization half"):
        make(Encoder(dataclasses.replace(config, normalization="imagenet")), corpus, locked="timm")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224' cannot be fetched \(no route to host\)"):
        make(Encoder(config), corpus, locked="timm")


def test_a_pretrained_text_tower(encoder: Encoder, corpus: Corpus, batch: Batch, tmp_path: Path) -> None:
    tokenizer = corpus.need_tokenizer("tests")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(3)
    bert = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=16, **size))
    bert.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    method = make(encoder, corpus, text_model=str(tmp_path))
    words = method.get_parameter("text.model.embeddings.word_embeddings.weight")
    assert torch.equal(words, bert.embeddings.word_embeddings.weight)
    shared = method.embed(batch, key(0, 0)).shared
    method.loss(shared)["contrastive"].backward()  # type: ignore[no-untyped-call]
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    tables = ("word", "position", "token_type")
    assert method.no_weight_decay() == {f"text.model.embeddings.{name}_embeddings.weight" for name in tables}


def test_recipe_of_the_source() -> None:
    config = LiT.Config()
    assert (config.text.context, config.text.width, config.scale) == (16, 512, 10.0)
    assert LiT.optim.lr == 1e-3 and LiT.optim.clip_norm == 1 and LiT.optim.betas == (0.9, 0.999)


def test_prepare(method: LiT, corpus: Corpus, document: Callable[..., Document]) -> None:
    at, prepare = key(0, 5), method.prepare(Crop(), 32)
    example = prepare(document(text="two dogs"), at)
    assert example is not None
    assert torch.equal(example["image"], Crop()(document().images[0], 32, at))
    assert torch.equal(example["text"], corpus.need_tokenizer("tests").encode("two dogs", 16))
    assert prepare(document(text=None), at) is None


def test_needs_text(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="lit learns from text"):
        LiT(CONFIG, encoder, Corpus())
