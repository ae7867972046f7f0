"""BERT as a text tower against PyTorch's own layers; pre-trained ones from a folder; what is refused."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.nn import language
from altsight.nn.language import BertTower, BertTowerConfig, PretrainedTower

CONFIG = BertTowerConfig(width=32, heads=4, layers=2, context=16)
TEXTS = ["two dogs", "a red house by the sea"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a red house by the sea", "two dogs on a red sofa"] * 3), 300)


@pytest.fixture
def tower(tokenizer: Tokenizer) -> BertTower:
    tower = BertTower(CONFIG, tokenizer, 24)
    tower.init_weights(key(0, 0))
    return tower.eval()


def reference(tower: BertTower, ids: Tensor, end: int) -> Tensor:
    """BERT, text by text up to its end token, from nn.TransformerEncoderLayer."""
    state = tower.model.state_dict()
    features = []
    for row in ids:
        row = row[: row.tolist().index(end) + 1]
        x = state["embeddings.word_embeddings.weight"][row] + state["embeddings.token_type_embeddings.weight"][0]
        x = x + state["embeddings.position_embeddings.weight"][: len(row)]
        x = norm(x, state, "embeddings.LayerNorm")
        for number in range(CONFIG.layers):
            layer = nn.TransformerEncoderLayer(
                CONFIG.width, CONFIG.heads, 4 * CONFIG.width, dropout=0.0, activation="gelu", layer_norm_eps=1e-12
            )
            name = f"encoder.layer.{number}."
            theirs = {}
            for part in ("weight", "bias"):
                three = [state[f"{name}attention.self.{x}.{part}"] for x in ("query", "key", "value")]
                theirs[f"self_attn.in_proj_{part}"] = torch.cat(three)
                theirs[f"self_attn.out_proj.{part}"] = state[f"{name}attention.output.dense.{part}"]
                theirs[f"norm1.{part}"] = state[f"{name}attention.output.LayerNorm.{part}"]
                theirs[f"linear1.{part}"] = state[f"{name}intermediate.dense.{part}"]
                theirs[f"linear2.{part}"] = state[f"{name}output.dense.{part}"]
                theirs[f"norm2.{part}"] = state[f"{name}output.LayerNorm.{part}"]
            layer.load_state_dict(theirs)
            x = layer(x)
        features.append(x[0] @ tower.projection.weight.T + tower.projection.bias)
    return torch.stack(features)


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def test_equals_reference(tower: BertTower, tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(tower.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        ids = tokenizer.encode_all([*TEXTS, "the sea by the sea by the sea by the sea by the sea"], 16)
        torch.testing.assert_close(tower(ids), reference(tower, ids, tokenizer.end), rtol=1e-4, atol=1e-5)


def test_padding_has_no_influence_and_every_word_has(tower: BertTower, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_all(TEXTS, 16)
    for row, last in enumerate((ids == tokenizer.end).int().argmax(dim=1).tolist()):
        padded, other = ids.clone(), ids.clone()
        padded[row, last + 1 :] = 10
        torch.testing.assert_close(tower(padded), tower(ids))
        for place in range(1, last):
            other[row, place] = 11
            assert not torch.allclose(tower(other)[row], tower(ids)[row])
    torch.testing.assert_close(tower(ids[:, :12]), tower(ids))
    assert torch.equal(tower.encode(TEXTS), ids)


def test_a_tokenizer_that_pads_with_its_end_token(tokenizer: Tokenizer) -> None:
    """CLIP's: the end token is learned as any other, and those after the first are padding."""
    same = Tokenizer(tokenizer.model, pad=tokenizer.end, start=tokenizer.start, end=tokenizer.end)
    tower = BertTower(CONFIG, same, 24)
    tower.init_weights(key(0, 0))
    ids = same.encode_all(TEXTS, 16)
    words = tower.model.embeddings.word_embeddings
    assert words.weight[same.end].any()
    tower(ids).sum().backward()
    assert words.weight.grad[same.end].any()
    torch.testing.assert_close(tower(ids[:, :12]), tower(ids))


def test_start(tokenizer: Tokenizer) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.fill_(math.nan)
        tower.init_weights(key(seed, 0))
        return {name: value.detach().clone() for name, value in tower.named_parameters()}

    tower = BertTower(dataclasses.replace(CONFIG, width=128), tokenizer, 96)
    first, again, other = start(0), start(0), start(1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.15), name
            assert not torch.equal(value, other[name])
        else:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("LayerNorm.weight")))), name


def test_bert_base_has_the_published_size() -> None:
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 30522)}
    bert = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w3")), pad=0, start=1, end=2)
    with torch.device("meta"):
        tower = BertTower(BertTowerConfig(context=512), bert, 768)
    # bert-base-uncased has 109,482,240, of which its pooler 768 * 769.
    assert sum(p.numel() for p in tower.model.parameters()) == 109_482_240 - 768 * 769
    assert tower.projection.weight.shape == (768, 768) and tower.projection.bias is not None


def test_sizes_that_do_not_fit(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="width 32 is not divisible by its 3 heads"):
        BertTower(dataclasses.replace(CONFIG, heads=3), tokenizer, 24)
    with pytest.raises(UserError, match="context of 2"):
        BertTower(dataclasses.replace(CONFIG, context=2), tokenizer, 24)


def save_bert(folder: Path, tokenizer: Tokenizer) -> BertModel:
    """Write a tiny BERT and its tokenizer, as a hub keeps them."""
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
        hidden_dropout_prob=0.5,
    )
    torch.manual_seed(3)
    model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model.eval()


def test_pretrained_from_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = save_bert(tmp_path, tokenizer)
    tower = PretrainedTower(str(tmp_path), tokenizer, 16, 24)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(math.nan)
    tower.init_weights(key(0, 0))
    ids = tokenizer.encode_all(TEXTS, 16)
    mask = torch.tensor([[place <= row.tolist().index(tokenizer.end) for place in range(16)] for row in ids]).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    expected = states @ tower.projection.weight.T + tower.projection.bias
    torch.testing.assert_close(tower.train()(ids), expected, rtol=1e-4, atol=1e-6)
    assert not any("pooler" in name for name, _ in tower.named_parameters()), "nothing would train it"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in tower.parameters())


def test_pretrained_models_that_do_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_bert(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"reads 20 tokens at most, and a text has 21.*text\.context"):
        PretrainedTower(str(tmp_path), tokenizer, 21, 24)
    other = train_tokenizer(iter(["cats and dogs"] * 3), 280)
    tower = PretrainedTower(str(tmp_path), other, 16, 24)
    with pytest.raises(UserError, match=r"tokens of the data set are not those.*--tokenizer .*tokenizer\.json"):
        tower.init_weights(key(0, 0))
    with pytest.raises(UserError, match=r"nowhere' cannot be loaded.*--method\.text-model") as error:
        PretrainedTower(str(tmp_path / "nowhere"), tokenizer, 16, 24)
    assert "\n" not in str(error.value)


def test_a_model_that_reads_from_left_to_right_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    tower = PretrainedTower(str(tmp_path), tokenizer, 16, 24)
    with pytest.raises(UserError, match="reads from left to right"):
        tower.init_weights(key(0, 0))


def test_transformers_is_imported_where_it_is_needed() -> None:
    tree = ast.parse(Path(language.__file__).read_text())
    top = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
    assert "torch" in names and "transformers" not in names
