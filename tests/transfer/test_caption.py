"""Captioners on any encoder: what they see, what they train, what they refuse; seconds on one core."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import altsight
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.shapes import TEMPLATES, Shapes
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.data.views import Crop
from altsight.evals.base import View
from altsight.evals.load import view_of
from altsight.methods.base import Corpus
from altsight.methods.clip import CLIP
from altsight.nn.decoding import BEAM, GREEDY
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.prefix import LanguageSize, language_tokenizer
from altsight.nn.text import TextConfig
from altsight.train.run import weights_hash
from altsight.transfer.base import FitConfig
from altsight.transfer.caption import Caption
from altsight.transfer.caption_data import open_captioned
from altsight.transfer.captioner import Captioner, CaptionerConfig, build_captioner

ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2)
SIZE = LanguageSize(width=48, heads=2, layers=2)
CONFIG = CaptionerConfig(
    *("", "", 0, "prefix", "", SIZE, 16),
    tune_encoder=False,
    freeze_language_model=False,
    tuned_lr_scale=0.02,
    gate="srau",
    tau=0.2,
    crop=Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False),
)
TEXTS = ("a red house by the sea", "two dogs", "a green sofa")


def write_shapes(folder: Path, size: int, seed: int, captions: bool = True) -> str:
    """Write made-up pictures beside a table with all six captions of each; return the table's path."""
    folder.mkdir()
    source = Shapes(size, seed)
    lines = []
    for i in range(size):
        (folder / f"{i}.png").write_bytes(source.image(i))
        texts = [template.format(**source.fields(i)) for template in TEMPLATES] if captions else []
        lines.append(json.dumps({"image": f"{i}.png", "captions": texts}))
    (folder / "table.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "table.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS * 3), 300)


@pytest.fixture
def encoder() -> Encoder:
    made = Encoder(ENCODER)
    made.init_weights(key(0, 0, "init"))
    return made


@pytest.fixture
def view() -> View:
    return toy_view()


def toy_view() -> View:
    """A CLIP of random weights."""
    tokenizer = train_tokenizer(iter(TEXTS * 3), 300)
    clip = CLIP(CLIP.Config(TextConfig(32, 2, 1, 16), 16), Encoder(ENCODER), Corpus(tokenizer))
    clip.init_weights(key(0, 0, "init"))
    return view_of(clip.eval(), "random clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("shapes")
    return write_shapes(folder / "train", 24, 0), write_shapes(folder / "test", 6, 1)


def tiny(data: tuple[str, str], **settings: Any) -> Caption:
    how = FitConfig(epochs=1, batch=16, precision="fp32", device="cpu", workers=0)
    given = {"captions": ("{captions[]}",), "size": SIZE, "length": 24, "metrics": ("bleu", "cider"), "fit": how}
    return Caption(*data, **(given | {"vocab_size": 300} | settings))


def build(encoder: Encoder, tokenizer: Tokenizer, **changes: Any) -> Captioner:
    return build_captioner(dataclasses.replace(CONFIG, **changes), encoder, tokenizer, key(0, 0, "caption"))


def batch_of(tokenizer: Tokenizer) -> Batch:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch({"image": images, "text": tokenizer.encode_all(TEXTS, 16)}, torch.arange(3), torch.arange(3))


def save_gpt2(folder: Path, tokenizer: Tokenizer, **changes: Any) -> str:
    size: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "n_positions": 40,
        "n_embd": 24,
        "n_layer": 1,
        "n_head": 3,
    }
    GPT2LMHeadModel(GPT2Config(**(size | changes))).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


def test_the_language_model_reads_picture_then_words(encoder: Encoder, tokenizer: Tokenizer) -> None:
    """Token by token through the language model itself, from the rows of its table."""
    model, batch = build(encoder, tokenizer), batch_of(tokenizer)
    language: Any = model.decoder.model
    language.transformer.wte.weight.data.mul_(20)  # far from uniform
    patches = encoder(encoder.normalize(batch["image"])).patches
    first, _, last = model.visual.layers
    total, count = 0.0, 0
    for row, ids in enumerate(batch["text"].tolist()):
        picture = last(torch.nn.functional.gelu(first(patches[row])))
        for t in range(1, ids.index(tokenizer.end) + 1):
            x = torch.cat([picture, language.transformer.wte.weight[ids[:t]]])[None]
            scores = language(inputs_embeds=x).logits[0, -1].double()
            total += float((scores.exp().sum().log() - scores[ids[t]]).detach())
            count += 1
    assert model.embed(batch, key(0, 0)).local["caption"].item() == pytest.approx(total, rel=1e-4)
    assert model.counts(batch)["caption"].item() == count


@pytest.mark.parametrize("decoder", ["prefix", "visualgpt"])
@pytest.mark.parametrize("tune", [False, True])
def test_a_frozen_encoder_has_no_gradient_and_stays_in_evaluation(
    encoder: Encoder, tokenizer: Tokenizer, decoder: str, tune: bool
) -> None:
    model = build(encoder, tokenizer, decoder=decoder, tune_encoder=tune).train()
    assert model.encoder.training is tune and model.decoder.training
    model.embed(batch_of(tokenizer), key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    fixed = {name for name, p in model.named_parameters() if name.startswith("encoder.") and not tune}
    unused = {"encoder.backbone.pos_embed"}  # sine-cosine
    assert with_gradient == {name for name, _ in model.named_parameters()} - fixed - unused


@pytest.mark.parametrize("decoder", ["prefix", "visualgpt"])
def test_learned_captions_come_out_again(encoder: Encoder, tokenizer: Tokenizer, decoder: str) -> None:
    model, batch = build(encoder, tokenizer, decoder=decoder).train(), batch_of(tokenizer)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model.embed(batch, key(0, 0)).local["caption"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for decoding in (GREEDY, BEAM):
        assert model.caption(batch["image"], decoding=decoding) == list(TEXTS)


def test_a_given_language_model_is_taken_over(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path, tokenizer)
    gpt2 = GPT2LMHeadModel.from_pretrained(folder)
    ids = torch.tensor([[1, 44, 70, 20]])
    model = build(encoder, tokenizer, language_model=folder, freeze_language_model=True)
    assert not any(p.requires_grad for p in model.decoder.parameters())
    assert torch.equal(model.decoder(ids, []), gpt2(ids).logits)
    assert model.lr_scales() == {"encoder.": 0.02, "decoder.": 0.02}
    gated = build(encoder, tokenizer, decoder="visualgpt", language_model=folder).eval()
    assert (gated.decoder(ids) - gpt2(ids).logits).abs().max() <= 1e-5
    assert gated.lr_scales() == {"encoder.": 0.02}


def test_any_causal_language_model_will_do(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A Llama whose table has more rows than the tokenizer has tokens."""
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size + 9, **size)).save_pretrained(tmp_path)
    model = build(encoder, tokenizer, language_model=str(tmp_path))
    assert model.decoder(torch.tensor([[1, 44]]), []).shape == (1, 2, tokenizer.vocab_size)
    assert len(model.caption(batch_of(tokenizer)["image"])) == 3


@pytest.mark.parametrize(
    ("start", "end"), [("<s>", "</s>"), ("<bos>", "<eos>"), ("<|begin_of_text|>", "<|end_of_text|>")]
)
def test_the_special_tokens_of_llama_and_gemma_are_known(tmp_path: Path, start: str, end: str) -> None:
    """Words of theirs may look like another's special token."""
    names = ["<pad>"] if start == "<bos>" else []
    vocabulary = {name: number for number, name in enumerate([*names, "<?", start, end, "dog"])}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, "dog")).save(str(tmp_path / "tokenizer.json"))
    found = language_tokenizer(str(tmp_path))
    assert (found.start, found.end) == (vocabulary[start], vocabulary[end])
    assert found.pad == vocabulary[names[0] if names else end]


def test_captions_are_written_and_scored_and_the_view_stays(view: View, data: tuple[str, str], tmp_path: Path) -> None:
    before = weights_hash(view.encoder)
    results = tiny(data, tune_encoder=True)(view, tmp_path)
    assert weights_hash(view.encoder) == before
    tuned = altsight.load(tmp_path / "encoder.safetensors").encoder
    assert weights_hash(tuned) != before and tuned.config == view.encoder.config
    assert [r.metric for r in results] == ["bleu1", "bleu2", "bleu3", "bleu4", "cider"]
    for result in results:
        assert result.n == 6 and result.split == "test" and result.extra["references"] == 36
        assert result.low is not None and result.value is not None and result.chance is not None
        assert result.extra["seed"] == 0 and result.extra["decoding"]["beams"] == 5 and result.data
    written = json.loads((tmp_path / "captions.json").read_text())
    assert len(written) == 6 and all(len(one["references"]) == 6 for one in written)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples_seen"] == 144  # 24 x 6 captions
    # Again with other images and another decoding: nothing is trained.
    bare = write_shapes(tmp_path / "bare", 3, 2, captions=False)
    settings = tiny((data[0], bare), tune_encoder=True, decoding=dataclasses.replace(BEAM, how="nucleus"))
    (result,) = settings(view, tmp_path)
    assert result.value is None and "no captions" in result.note and result.n == 3
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 3
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with pytest.raises(UserError, match="holds another run"):
        tiny(data, tune_encoder=True, fraction=0.5)(view, tmp_path)


def test_the_python_call(view: View, data: tuple[str, str], tmp_path: Path) -> None:
    settings = {f.name: getattr(tiny(data), f.name) for f in dataclasses.fields(Caption)}
    assert altsight.transfer("caption", view, tmp_path, **(settings | {"decoder": "visualgpt"}))[0].value is not None


def test_a_fraction_is_of_the_captions(data: tuple[str, str]) -> None:
    """An image may keep one of its six (specification 8.2)."""
    whole = open_captioned(data[0], ("{captions[]}",), 1.0, 0)
    part, same, other = (open_captioned(data[0], ("{captions[]}",), 0.25, seed) for seed in (0, 0, 1))
    assert len(whole) == 144 and len(part) == 36
    texts = {(name, text) for name, text in ((whole.name(i), whole.caption(i)) for i in range(144))}
    assert len(texts) == 144 and {(part.name(i), part.caption(i)) for i in range(36)} < texts
    counts = torch.tensor(part.chosen[:, 0]).bincount(minlength=24)
    assert counts.min() < 1.5 < counts.max()
    assert part.digest == same.digest and len({whole.digest, part.digest, other.digest}) == 3
    document = part.document(3, key(0, 0))
    assert document.texts == (part.caption(3),) and document.images == (part.pairs.image(int(part.chosen[3, 0])),)


def refused(settings: Caption, view: View, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        settings(view, out / "run")
    assert not (out / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_use_is_refused_before_anything_is_written(
    view: View, data: tuple[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bare = write_shapes(tmp_path / "bare", 3, 2, captions=False)
    assert "has no captions" in refused(tiny((bare, data[1])), view, tmp_path)
    assert "nowhere" in refused(tiny((data[0], str(tmp_path / "nowhere"))), view, tmp_path)
    assert "leaves none" in refused(tiny(data, fraction=0.001), view, tmp_path)
    assert "a share of 2" in refused(tiny(data, fraction=2.0), view, tmp_path)
    missing = refused(tiny(data, language_model=str(tmp_path / "no model")), view, tmp_path)
    assert "no model" in missing
    (tmp_path / "empty").mkdir()
    assert "no tokenizer.json" in refused(tiny(data, language_model=str(tmp_path / "empty")), view, tmp_path)
    assert "no room for a start" in refused(tiny(data, length=2), view, tmp_path)
    assert "must learn" in refused(tiny(data, freeze_language_model=True), view, tmp_path)
    assert "equal heads" in refused(tiny(data, size=LanguageSize(48, 5, 1)), view, tmp_path)
    assert "equal heads" in refused(tiny(data, size=LanguageSize(48, 5, 1), decoder="visualgpt"), view, tmp_path)
    short = save_gpt2(tmp_path / "short", tokenizer, n_positions=20)
    assert "reads 20 tokens at most" in refused(tiny(data, language_model=short), view, tmp_path)
    few = save_gpt2(tmp_path / "few", tokenizer, vocab_size=99)
    assert "do not belong together" in refused(tiny(data, language_model=few), view, tmp_path)
    frozen = tiny(data, language_model=short, decoder="visualgpt", freeze_language_model=True, length=16)
    assert "inside of its language model" in refused(frozen, view, tmp_path)
