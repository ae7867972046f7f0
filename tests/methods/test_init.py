"""Initial weights: a pure function of the key, complete, and the same encoder under every method."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from altsight.core.rng import key
from altsight.methods import METHODS, find
from altsight.methods.base import Corpus, Method
from altsight.nn.encoder import Encoder, EncoderConfig
from tests.contract.tiny import tiny_run

CONFIGS = {
    "mae_init": EncoderConfig("vit_tiny_patch16_224", 32, 8, 32, 2, 2, registers=2),
    "timm_init": EncoderConfig(
        "vit_tiny_patch16_224", 32, 8, 32, 2, 2, positions="learned", init="timm", pre_norm=True, quick_gelu=True
    ),
}


def build(name: str, corpus: Corpus, config: EncoderConfig) -> Method:
    return find(name)(tiny_run(name, Path(), 64).method, Encoder(config), corpus)  # type: ignore[call-arg]


def ruin(method: Method) -> None:
    """Fill every parameter and floating buffer with NaN."""
    with torch.no_grad():
        for tensor in [*method.parameters(), *method.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)


def initial(method: Method, seed: int) -> dict[str, Tensor]:
    ruin(method)
    method.init_weights(key(seed, 0, "init"))
    return {name: value.clone() for name, value in method.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_no_parameter_survives_and_the_key_decides(name: str, corpus: Corpus) -> None:
    method = build(name, corpus, CONFIGS["mae_init"])
    torch.manual_seed(1)
    first = initial(method, 0)
    torch.manual_seed(2)
    second, other = initial(method, 0), initial(method, 1)
    for part, value in first.items():
        assert torch.isfinite(value).all(), part
        assert torch.equal(value, second[part]), part
    differ = {part for part, value in first.items() if not torch.equal(value, other[part])}
    same = {part for part in first if part not in differ and first[part].numel() > 1 and first[part].std() > 1e-6}
    assert all(part.endswith(("pos_embed", "positions")) for part in same), same


@pytest.mark.parametrize("config", CONFIGS)
def test_every_method_starts_from_the_same_encoder(config: str, corpus: Corpus) -> None:
    encoders = [initial(build(name, corpus, CONFIGS[config]), 0) for name in METHODS]
    names = [name for name in encoders[0] if name.startswith("encoder.")]
    assert len(names) > 20
    for other in encoders[1:]:
        assert all(torch.equal(encoders[0][name], other[name]) for name in names)
