"""VisualGPT's gates, and GPT-2 inside of them: equal to transformers' own where the gates let the language through."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.gated import Gate, GatedConfig, GatedGPT2, VisualEncoder, gates, language_model

SMALL = GatedConfig(width=24, heads=3, layers=2, length=10, visual_hidden=32, dropout=0.0, cross_dropout=0.0)
ALPHAS = torch.linspace(0, 1, 1001)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated(config: GatedConfig = SMALL) -> GatedGPT2:
    decoder = GatedGPT2(config, 41)
    decoder.init_weights(key(0, 0))
    return decoder


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A GPT-2 of the same size whose weights, biases and norms are all drawn, so that none can be mixed up."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_positions=16, n_embd=24, n_layer=2, n_head=3)).eval()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=number) * 0.3)
    return model


def levels(count: int, seed: int = 5) -> list[Tensor]:
    return [random(2, 6, 24, seed=seed + i) for i in range(count)]


IDS = torch.tensor([[1, 4, 7, 2, 40], [1, 9, 3, 5, 8]])


def let_language_through(decoder: GatedGPT2) -> None:
    """Force alpha to 1."""
    for name, p in decoder.named_parameters():
        if ".alphas." in name:
            torch.nn.init.constant_(p, 100.0 if name.endswith("bias") else 0.0)


@pytest.mark.parametrize("kind", ["srau", "normalised", "complementary"])
def test_one_level_and_alpha_1_is_gpt2(gpt2: Any, kind: Gate) -> None:
    decoder = gated(dataclasses.replace(SMALL, levels=1, gate=kind))
    decoder.load(gpt2.state_dict())
    expected = gpt2(IDS).logits
    assert (decoder(IDS) - expected).abs().max() <= 1e-5
    assert not torch.allclose(decoder(IDS, levels(1)), expected, atol=1e-2)
    let_language_through(decoder)
    assert (decoder(IDS, levels(1)) - expected).abs().max() <= 1e-5
    assert torch.equal(decoder(IDS, levels(1)), decoder(IDS))


def test_three_levels_scale_the_residual_by_the_root_of_3(gpt2: Any) -> None:
    decoder = gated(dataclasses.replace(SMALL, layers=1))
    weights = {name: v for name, v in gpt2.state_dict().items() if ".h.1." not in name}
    decoder.load(weights)
    let_language_through(decoder)
    block = decoder.blocks[0]
    x = random(2, 5, 24)
    normed = block.norm1(x)
    a = x + block.attention(normed, normed, causal=True)
    scaled = a * 3**0.5
    expected = scaled + block.contract(torch.nn.functional.gelu(block.expand(block.norm2(scaled)), approximate="tanh"))
    torch.testing.assert_close(block(x, levels(3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.2, 0.4, 0.5, 0.7])
def test_gate_algebra(tau: float) -> None:
    language, vision = gates(ALPHAS, tau, "srau")
    both, none = ((language > 0) & (vision > 0)).float().mean(), ((language == 0) & (vision == 0)).any()
    assert both == pytest.approx(max(1 - 2 * tau, 0), abs=0.004)
    assert bool(none) is (tau >= 0.5)
    assert (language[language > 0] > tau).all() and (vision[vision > 0] > tau).all()
    if tau < 0.5:
        assert (language + vision >= 1 - tau - 1e-6).all()
    if tau == 0:
        torch.testing.assert_close(language + vision, torch.ones(1001))


def test_gate_variants() -> None:
    language, vision = gates(ALPHAS, 0.2, "complementary")
    assert torch.equal(language, ALPHAS) and torch.equal(vision, 1 - ALPHAS)
    language, vision = gates(ALPHAS, 0.2, "normalised")
    torch.testing.assert_close(language + vision, torch.ones(1001))
    assert (vision[ALPHAS > 0.81] == 0).all() and (language[ALPHAS > 0.81] == 1).all()
    language, vision = gates(ALPHAS, 0.2, "plain")
    assert (language == 1).all() and (vision == 1).all()
    assert torch.isfinite(torch.stack(gates(ALPHAS, 0.6, "normalised"))).all()


@pytest.mark.parametrize(("alpha", "open_gate"), [(0.95, "language"), (0.05, "vision")])
def test_a_shut_gate_resurrects_itself(alpha: float, open_gate: str) -> None:
    """One gate is a hard 0, and alpha still gets a gradient: through the other one."""
    point = torch.tensor(alpha, requires_grad=True)
    language, vision = gates(point, 0.2, "srau")
    assert (vision if open_gate == "language" else language) == 0
    (0.3 * language + 0.7 * vision).backward()
    assert point.grad == pytest.approx(0.3 if open_gate == "language" else -0.7)


def test_gradient_reaches_the_gate_whose_vision_is_shut() -> None:
    decoder = gated(dataclasses.replace(SMALL, levels=1, layers=1))
    let_language_through(decoder)
    alpha = decoder.blocks[0].alphas[0]
    torch.nn.init.constant_(alpha.bias, 2.9)  # alpha = 0.948
    decoder(IDS, levels(1)).square().sum().backward()
    assert alpha.bias.grad is not None and alpha.bias.grad.abs().max() > 1e-4
    assert decoder.blocks[0].cross.value.weight.grad.abs().max() == 0


def slow_mix(block: Any, x: Tensor, level: Tensor, number: int, config: GatedConfig) -> Tensor:
    """The formula of the specification, 8.1, element by element."""
    seen = block.cross(block.norm1(x), block.norm1(level))
    alpha = block.alphas[number]
    given = torch.cat([x, seen], dim=-1) if config.gate_input == "concat" else x
    logit = given @ alpha.weight.T + alpha.bias
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        at = tuple(place)
        a = 1 / (1 + torch.exp(-logit[at]))
        out[at] = (a * x[at] if a > config.tau else 0) + ((1 - a) * seen[at] if 1 - a > config.tau else 0)
    return out


@pytest.mark.parametrize("gate_input", ["concat", "hidden"])
def test_block_equals_reference(gate_input: Any) -> None:
    config = dataclasses.replace(SMALL, layers=1, gate_input=gate_input, tau=0.4)
    decoder, x, seen = gated(config), random(2, 5, 24), levels(3)
    block = decoder.blocks[0]
    with torch.no_grad():
        normed = block.norm1(x)
        a = x + block.attention(normed, normed, causal=True)
        h = sum(slow_mix(block, a, level, number, config) for number, level in enumerate(seen)) / 3**0.5
        hidden = torch.nn.functional.gelu(block.expand(block.norm2(h)), approximate="tanh")
        torch.testing.assert_close(block(x, seen), h + block.contract(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["srau", "plain"])
def test_token_changes_no_earlier_logits(kind: Gate) -> None:
    decoder = gated(dataclasses.replace(SMALL, gate=kind))
    logits = decoder(IDS, levels(3))
    for t in range(1, 5):
        changed = IDS.clone()
        changed[:, t] = 20
        other = decoder(changed, levels(3))
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.allclose(other[:, t], logits[:, t])


def test_the_image_matters_at_every_level() -> None:
    decoder, seen = gated(), levels(3)
    logits = decoder(IDS, seen)
    for number in range(3):
        other = list(seen)
        other[number] = random(2, 6, 24, seed=99)
        assert not torch.allclose(decoder(IDS, other), logits)


def test_visual_encoder_hands_over_every_layer() -> None:
    encoder = VisualEncoder(dataclasses.replace(SMALL, levels=3), 20)
    x = random(2, 6, 20)
    found = encoder(x)
    assert [tuple(level.shape) for level in found] == [(2, 6, 24)] * 3
    inside = encoder.embed(x)
    for layer, level in zip(encoder.layers, found, strict=True):
        inside = layer(inside)
        assert torch.equal(inside, level)


def test_folder_and_file_of_a_language_model(gpt2: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path / "lm")
    torch.save(gpt2.state_dict(), tmp_path / "lm.pt")
    for name in ("lm", "lm.pt"):
        decoder = gated()
        decoder.load(language_model(str(tmp_path / name), 3))
        assert (decoder(IDS) - gpt2(IDS).logits).abs().max() <= 1e-5


def test_language_models_that_do_not_fit(gpt2: Any, tmp_path: Path) -> None:
    weights = gpt2.state_dict()
    with pytest.raises(UserError, match=r"knows 41 tokens and the data set 50: .*prepare --tokenizer gpt2"):
        GatedGPT2(SMALL, 50).load(weights)
    with pytest.raises(
        UserError, match="24 wide, with 2 layers and texts of up to 16 tokens, and the decoder 24 with 3"
    ):
        GatedGPT2(dataclasses.replace(SMALL, layers=3), 41).load(weights)
    with pytest.raises(UserError, match=r"texts of up to 16 tokens, and the decoder .* and 17"):
        GatedGPT2(dataclasses.replace(SMALL, length=17), 41).load(weights)
    with pytest.raises(UserError, match=r"tau within \[0, 1\)"):
        GatedGPT2(dataclasses.replace(SMALL, tau=1.0), 41)
    gpt2.save_pretrained(tmp_path / "lm")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="has 3 heads"):
        language_model(str(tmp_path / "lm"), 2)
    with pytest.raises(UserError, match="is a bert"):
        language_model(str(tmp_path / "bert"), 12)
    with pytest.raises(UserError, match="does not exist"):
        language_model(str(tmp_path / "none.pt"), 3)
    with pytest.raises(UserError, match="cannot be loaded"):
        language_model(str(tmp_path), 3)
