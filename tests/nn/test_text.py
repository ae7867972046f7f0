"""The text tower against a reference built from PyTorch's own layers; causality; initialisation."""

from __future__ import annotations

import dataclasses

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.nn.text import LayerNorm, TextConfig, TextTower

CONFIG = TextConfig(width=32, heads=4, layers=2, context=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a red house by the sea", "two dogs on a red sofa"] * 3), 300)


@pytest.fixture
def tower(tokenizer: Tokenizer) -> TextTower:
    tower = TextTower(CONFIG, tokenizer, 24)
    tower.init_weights(key(0, 0))
    return tower


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def reference(tower: TextTower, ids: Tensor, end: int) -> Tensor:
    """The tower, text by text and without batching, from nn.TransformerEncoderLayer."""
    width, heads = tower.config.width, tower.config.heads
    features = []
    for row in ids:
        x = tower.token_embedding.weight[row] + tower.positional_embedding[: len(row)]
        for block in tower.blocks:
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation=quick_gelu, norm_first=True, batch_first=True
            )
            names = {
                "norm1": "norm1",
                "norm2": "norm2",
                "attn.qkv.": "self_attn.in_proj_",
                "attn.proj": "self_attn.out_proj",
                "mlp.fc1": "linear1",
                "mlp.fc2": "linear2",
            }
            state = {}
            for name, value in block.state_dict().items():
                ours = next(prefix for prefix in names if name.startswith(prefix))
                state[names[ours] + name.removeprefix(ours)] = value
            layer.load_state_dict(state)
            mask = torch.full((len(row), len(row)), -torch.inf).triu(1)
            x = layer(x.unsqueeze(0), src_mask=mask)[0]
        x = nn.functional.layer_norm(x, (width,), tower.ln_final.weight, tower.ln_final.bias, 1e-5)
        features.append(x[row.tolist().index(end)] @ tower.text_projection.weight.T)
    return torch.stack(features)


def test_equals_reference(tower: TextTower, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_all(["a red house", "dogs", "the sea by the sea by the sea by the sea"], 16)
    with torch.no_grad():
        for parameter in tower.parameters():  # biases and gains away from 0 and 1
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        torch.testing.assert_close(tower(ids), reference(tower, ids, tokenizer.end), rtol=1e-4, atol=1e-5)


def test_text_after_end_has_no_influence(tower: TextTower, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_all(["two dogs", "a sofa"], 16)
    ends = (ids == tokenizer.end).int().argmax(dim=1)
    after, before = ids.clone(), ids.clone()
    for row, end in enumerate(ends.tolist()):
        after[row, end + 1 :] = torch.arange(10, 10 + 15 - end)
        after[row, -1] = tokenizer.end
        before[row, end - 1] = 10
    assert torch.equal(tower(after), tower(ids))
    assert not torch.allclose(tower(before), tower(ids))


def test_padding_with_the_end_token(tower: TextTower, tokenizer: Tokenizer) -> None:
    """CLIP's own tokenizer pads with the end token on some platforms: the first one counts."""
    ids = tokenizer.encode_all(["two dogs", "a sofa"], 16)
    assert torch.equal(tower(ids.masked_fill(ids == tokenizer.pad, tokenizer.end)), tower(ids))


def test_shorter_input_than_context(tower: TextTower, tokenizer: Tokenizer) -> None:
    texts = ["two dogs", "a sofa"]
    short, full = tokenizer.encode_all(texts, 8), tokenizer.encode_all(texts, 16)
    torch.testing.assert_close(tower(short), tower(full))


def test_layer_norm_is_evaluated_in_fp32() -> None:
    """bf16 has 8 bits: mean and variance taken in it would be off by per cents for an offset of 100."""
    x = (100 + torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    norm = LayerNorm(512).bfloat16()
    expected = nn.functional.layer_norm(x.double(), (512,))
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=1e-3)


def test_standard_deviations_of_clip(tokenizer: Tokenizer) -> None:
    config = TextConfig(width=256, heads=4, layers=3, context=77)
    tower = TextTower(config, tokenizer, 128)
    tower.init_weights(key(0, 0))
    residual = 256**-0.5 * 6**-0.5
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "blocks.1.attn.qkv.weight": 256**-0.5,
        "blocks.1.attn.proj.weight": residual,
        "blocks.1.mlp.fc1.weight": 512**-0.5,
        "blocks.1.mlp.fc2.weight": residual,
        "text_projection.weight": 256**-0.5,
    }
    for name, std in expected.items():
        value = tower.get_parameter(name)
        assert value.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(value.mean().item()) < 4 * std / value.numel() ** 0.5, name
    assert tower.text_projection.bias is None


def test_text_tower_of_clip_b_has_63_43_million_parameters() -> None:
    vocabulary = {"<|startoftext|>": 49406, "<|endoftext|>": 49407} | {f"w{i}": i for i in range(49406)}
    clip = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "w0")), pad=0, start=49406, end=49407)
    with torch.device("meta"):
        tower = TextTower(TextConfig(), clip, 512)
    block = 2 * 2 * 512 + (512 * 1536 + 1536) + (512 * 512 + 512) + (512 * 2048 + 2048) + (2048 * 512 + 512)
    by_hand = 49408 * 512 + 77 * 512 + 12 * block + 2 * 512 + 512 * 512
    assert sum(p.numel() for p in tower.parameters()) == by_hand
    assert round(by_hand / 1e6, 2) == 63.43


def test_sizes_that_do_not_fit(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="width 30 is not divisible by its 4 heads"):
        TextTower(dataclasses.replace(CONFIG, width=30), tokenizer, 24)
    with pytest.raises(UserError, match="context of 2"):
        TextTower(dataclasses.replace(CONFIG, context=2), tokenizer, 24)
