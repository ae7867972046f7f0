"""Attention against plain softmax, post-norm layers, and greedy writing by a script."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.nn.caption import Attention, Continue, PostNormLayer, greedy, write


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module) -> None:
    """Give every parameter a value of its own, far from an initialisation."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=number + 1) * 0.4)


def slow_attention(attention: Attention, x: Tensor, context: Tensor, seen: list[list[bool]]) -> Tensor:
    """One row; head by head and query by query."""
    q, k, v = attention.query(x), attention.key(context), attention.value(context)
    width = x.shape[1] // attention.heads
    out = torch.zeros_like(q)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            keys = [s for s in range(len(context)) if seen[t][s]]
            scores = [float(q[t, part] @ k[s, part]) / math.sqrt(width) for s in keys]
            total = sum(math.exp(score) for score in scores)
            for s, score in zip(keys, scores, strict=True):
                out[t, part] += math.exp(score) / total * v[s, part]
    return attention.out(out)


@pytest.mark.parametrize("case", ["to another sequence", "causal", "masked"])
def test_attention_equals_reference(case: str) -> None:
    attention = Attention(12, 3)
    fill(attention)
    x = random(2, 4, 12)
    context = random(2, 6, 12, seed=9) if case == "to another sequence" else x
    seen = [[s <= t or case != "causal" for s in range(context.shape[1])] for t in range(4)]
    mask = None
    if case == "masked":
        seen = [[s == t or (s + t) % 2 == 0 for s in range(4)] for t in range(4)]
        mask = torch.tensor(seen)
    out = attention(x, context, mask, causal=case == "causal")
    for row in range(2):
        torch.testing.assert_close(
            out[row], slow_attention(attention, x[row], context[row], seen), rtol=1e-4, atol=1e-5
        )


def test_attention_refuses_heads_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="width 10 is not divisible by its 3 heads"):
        Attention(10, 3)


@pytest.mark.parametrize("cross", [True, False])
def test_post_norm_layer_equals_reference(cross: bool) -> None:
    layer = PostNormLayer(12, 3, 20, 0.0, cross, nn.GELU())
    fill(layer)
    x, memory = random(2, 4, 12), random(2, 5, 12, seed=3)

    def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
        spread = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * module.weight + module.bias

    y = norm(x + layer.self_attention(x, x, causal=True), layer.self_norm)
    if cross:
        assert layer.cross_attention is not None and layer.cross_norm is not None
        y = norm(y + layer.cross_attention(y, memory), layer.cross_norm)
    first, last = layer.feed_forward[0], layer.feed_forward[3]
    hidden = y @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    y = norm(y + hidden @ last.weight.T + last.bias, layer.norm)
    torch.testing.assert_close(layer(x, memory if cross else None, causal=True), y, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    layer = PostNormLayer(12, 3, 20, 0.5, True, nn.GELU())
    fill(layer)
    x, memory = random(2, 4, 12), random(2, 5, 12, seed=3)
    assert not torch.equal(layer(x, memory), layer(x, memory))
    layer.eval()
    assert torch.equal(layer(x, memory), layer(x, memory))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a red house", "two dogs"]), 300)


def scripted(tokenizer: Tokenizer, script: list[list[int]], loud: list[int]) -> Continue:
    """Wants `script[row][t]` as the token at place t, and the `loud` tokens even more."""
    wanted = torch.tensor(script)

    def step(ids: Tensor) -> Tensor:
        logits = torch.zeros(len(ids), tokenizer.vocab_size)
        logits[:, loud] = 9.0
        logits[torch.arange(len(ids)), wanted[:, ids.shape[1]]] = 5.0
        return logits

    return step


def test_greedy_follows_the_largest_logit_to_the_end_token(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.start, tokenizer.end
    step = scripted(tokenizer, [[0, 0, 20, end, 50, 50, 50], [0, 0, 30, 31, 32, end, 50]], [tokenizer.pad, start])
    ids = greedy(step, tokenizer, torch.tensor([[start, 7]] * 2), max_length=7)
    assert ids.tolist() == [[start, 7, 20, end, end, end], [start, 7, 30, 31, 32, end]]


def test_greedy_stops_at_the_longest_length(tokenizer: Tokenizer) -> None:
    step = scripted(tokenizer, [[20] * 9], [tokenizer.pad])
    ids = greedy(step, tokenizer, torch.tensor([[tokenizer.start]]), max_length=5)
    assert ids.tolist() == [[tokenizer.start, 20, 20, 20, 20]]


def test_greedy_can_stop_where_padding_is_the_end_token(tokenizer: Tokenizer) -> None:
    same = dataclasses.replace(tokenizer, pad=tokenizer.end)
    step = scripted(same, [[0, 20, same.end, 50, 50]], [same.start])
    ids = greedy(step, same, torch.tensor([[same.start]]), max_length=5)
    assert ids.tolist() == [[same.start, 20, same.end]]


def test_bert_special_tokens_are_never_written() -> None:
    """MUG's demo shuts out 103, 101, 100 and 0: [MASK], [CLS], [UNK] and [PAD]; [SEP] ends the caption."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "dog": 5}
    bert = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]")), pad=0, start=2, end=3)
    step = scripted(bert, [[0, 5, 3, 5]], [0, 1, 2, 4])
    assert greedy(step, bert, torch.tensor([[2]]), max_length=4).tolist() == [[2, 5, 3]]


def test_write_starts_with_the_prefix_and_keeps_to_the_length(tokenizer: Tokenizer) -> None:
    words = tokenizer.model.encode("two dogs", add_special_tokens=False).ids
    end = tokenizer.end
    script = [[0] * (1 + len(words)) + [end] * 9] * 2
    images = torch.zeros(2, 3, 8, 8)
    assert write(scripted(tokenizer, script, []), tokenizer, images, "two dogs", 16) == ["two dogs"] * 2
    assert write(scripted(tokenizer, [[40] * 9], []), tokenizer, images[:1], "two dogs", 1) == [""]
