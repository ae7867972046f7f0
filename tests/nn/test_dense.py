"""Dense heads: batch norm over ranks, maps of any encoder, UPerNet and Semantic FPN."""

from __future__ import annotations

import os
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core import dist
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.nn.dense import FeatureMaps, LinearHead, MapNorm, levels_of
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.semantic_fpn import SemanticFPN
from altsight.nn.upernet import FCNHead, UPerHead

CONFIG = EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=6, heads=2)


def made(config: EncoderConfig = CONFIG) -> Encoder:
    encoder = Encoder(config)
    encoder.init_weights(key(0, 0, "init"))
    return encoder.eval()


def normed(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, gradient, running mean and variance of a fresh norm on `x`, for the loss sum(output * weights)."""
    x = x.clone().requires_grad_()
    norm = MapNorm(3)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    out = norm(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    assert norm.running_mean is not None and norm.running_var is not None
    return out.detach(), gradient, norm.running_mean, norm.running_var


def maps() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 5, 5) * 2 + 7, torch.randn(4, 3, 5, 5)


def _rank(rank: int, store: str, results: SimpleQueue[Any]) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, weights = (part[2 * rank : 2 * rank + 2] for part in maps())
    results.put((rank, [part.numpy() for part in normed(x, weights)]))
    dist.barrier()
    dist.stop()


def test_batch_norm_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    (_, first), (_, second) = sorted((results.get() for _ in range(2)), key=lambda found: found[0])
    out, gradient, mean, variance = normed(*maps())
    torch.testing.assert_close(torch.from_numpy(first[0]), out[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(second[0]), out[2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(second[1]), gradient[2:], rtol=1e-4, atol=1e-5)
    for found in (first, second):
        torch.testing.assert_close(torch.from_numpy(found[2]), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(found[3]), variance, rtol=1e-5, atol=1e-6)


def test_levels_are_those_of_the_specification() -> None:
    assert levels_of(12) == (3, 5, 7, 11) and levels_of(24) == (7, 11, 15, 23)
    assert levels_of(2) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CONFIG, (16, 8, 4, 2)),
        (EncoderConfig("resnet18", img_size=64), (16, 8, 4, 2)),
        (EncoderConfig("convnext_atto", img_size=64), (16, 8, 4, 2)),
    ],
    ids=["vit", "resnet", "convnext"],
)
def test_four_maps_of_any_encoder(config: EncoderConfig, sizes: tuple[int, ...]) -> None:
    encoder = made(config)
    module = FeatureMaps(encoder)
    found = module(encoder, encoder(torch.randn(2, 3, config.img_size, config.img_size)))
    assert tuple(x.shape[-1] for x in found) == sizes and tuple(x.shape[1] for x in found) == module.channels


def test_the_third_map_is_the_layer_itself() -> None:
    encoder = made()
    encoded = encoder(torch.randn(2, 3, 32, 32))
    third = FeatureMaps(encoder)(encoder, encoded)[2]
    patches = encoded.layers[3][:, encoded.prefix :]
    assert torch.equal(third[:, :, 1, 2], patches[:, 1 * 4 + 2])


def test_a_network_without_stages_is_refused() -> None:
    encoder = made(EncoderConfig("resnet18", img_size=64))
    encoder.backbone.feature_info = encoder.backbone.feature_info[:2]
    with pytest.raises(UserError, match="no four stages"):
        FeatureMaps(encoder)


def renamed(name: str) -> str:
    """Return what transformers calls a tensor of our UPerNet."""
    heads = {
        **{"pools": "psp_modules", "laterals": "lateral_convs", "outs": "fpn_convs"},
        **{"bottleneck": "bottleneck", "fuse": "fpn_bottleneck", "conv": "convs.0"},
    }
    head, *rest = name.split(".")
    if head not in heads:
        return name
    *number, layer, tensor = rest
    within = ["1"] if head == "pools" else []
    return ".".join([heads[head], *number, *within, ("conv", "batch_norm")[int(layer)], tensor])


def shaken(head: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not those of the start."""
    for module in head.modules():
        if isinstance(module, MapNorm) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return head.eval()


def test_upernet_is_that_of_transformers() -> None:
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    torch.manual_seed(0)
    channels = [8, 12, 16, 20]
    config = upernet.UperNetConfig(
        hidden_size=16, num_labels=5, auxiliary_in_channels=None, auxiliary_channels=12, auxiliary_num_convs=1
    )
    found = [torch.randn(2, n, side, side) for n, side in zip(channels, (16, 8, 4, 2), strict=True)]
    head, auxiliary = shaken(UPerHead(channels, 16, 5, 0.1)), shaken(FCNHead(16, 12, 5, 0.1))
    their_head, their_auxiliary = upernet.UperNetHead(config, channels), upernet.UperNetFCNHead(config, channels)
    for ours, theirs, maps in ((head, their_head, found), (auxiliary, their_auxiliary, found[2])):
        theirs.load_state_dict({renamed(name): value for name, value in ours.state_dict().items()})
        torch.testing.assert_close(ours(maps), theirs.eval()(found), rtol=1e-5, atol=1e-5)


def test_semantic_fpn_step_by_step() -> None:
    torch.manual_seed(0)
    fpn = shaken(SemanticFPN((4, 5, 6, 7), classes=3, channels=8))
    assert isinstance(fpn, SemanticFPN)
    found = [torch.randn(2, n, side, side) for n, side in ((4, 16), (5, 8), (6, 4), (7, 2))]
    sides = [lateral(x) for lateral, x in zip(fpn.laterals, found, strict=True)]
    for level in (2, 1, 0):
        sides[level] = sides[level] + sides[level + 1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    total = torch.zeros(2, 8, 16, 16)
    for level, (convs, doublings) in enumerate(zip(fpn.levels, (0, 1, 2, 3), strict=True)):
        x = fpn.outs[level](sides[level])
        blocks = [m for m in convs.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in convs.modules() if isinstance(m, MapNorm)]
        assert len(blocks) == max(doublings, 1)
        for conv, norm in zip(blocks, norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if doublings else x
        total = total + x
    torch.testing.assert_close(fpn(found), fpn.classifier(total), rtol=1e-5, atol=1e-5)


def test_the_linear_head_reads_patches() -> None:
    encoder = made()
    encoded = encoder(torch.randn(2, 3, 32, 32))
    head = shaken(LinearHead(encoder, 3))
    assert isinstance(head, LinearHead)
    logits = head(encoder, encoded)["segmentation"]
    x = head.norm(encoded.patches.transpose(1, 2).reshape(2, 32, 4, 4))
    torch.testing.assert_close(logits, head.classifier(x))
    two = LinearHead(encoder, 3, layers=2).eval()
    seen: list[Tensor] = []
    two.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    two(encoder, encoded)
    torch.testing.assert_close(seen[0][:, 32:], encoded.patches.mT.unflatten(2, (4, 4)))
    assert seen[0].shape == (2, 64, 4, 4)
    with pytest.raises(UserError, match="last 7 layers of 6"):
        LinearHead(encoder, 3, layers=7)
