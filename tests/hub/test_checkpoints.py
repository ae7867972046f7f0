"""Files with the names that the authors of methods gave them, made from timm's models; features as timm has them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import altsight
from altsight.core.errors import UserError
from altsight.hub.load import load_model
from altsight.hub.source import parse
from altsight.nn.init import sincos_2d

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
State = dict[str, Tensor]


def model(name: str = "vit_base_patch16_224", **changes: Any) -> Any:
    """Return a tiny model of timm with seeded weights, none of them at its neutral value."""
    torch.manual_seed(0)
    made = timm.create_model(name, **(TINY | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def same(source: Path | str, reference: Any, point: str = "cls", img_size: int = 0) -> None:
    """Load `source` and compare its features with those of timm's `reference`."""
    view = altsight.load(str(source), img_size=img_size)
    images = torch.randint(0, 256, (3, 3, view.preprocess.size, view.preprocess.size), dtype=torch.uint8)
    with torch.no_grad():
        tokens = reference.forward_features(view.encoder.normalize(images))
    theirs = {"cls": tokens[:, 0], "mean": tokens[:, reference.num_prefix_tokens :].mean(1)}
    expected = theirs[point] if point in theirs else reference.forward_head(tokens, pre_logits=True).detach()
    assert view.feature_point == point
    assert (view.features(images) - expected).abs().max() <= 1e-5


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def within(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_mae_pretrained(tmp_path: Path) -> None:
    vit = model()
    vit.pos_embed.data[:, 1:] = sincos_2d(64, (4, 4))
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    # MAE's files keep the arguments of the run beside the weights.
    content = {"model": vit.state_dict() | decoder, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    path = saved(content, tmp_path / "mae_pretrain_vit_base_full.pth")
    same(path, vit)
    found = load_model(str(path)).found
    assert "MAE" in found.recognised and found.left_over == ("decoder_pos_embed", "mask_token")
    same(saved({"model": vit.state_dict()}, tmp_path / "mae.pth"), vit)
    assert "sine-cosine" in load_model(str(tmp_path / "mae.pth")).found.recognised


def test_mae_fine_tuned_reads_the_mean_through_its_last_norm(tmp_path: Path) -> None:
    vit = model(global_pool="avg")
    head = {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    path = saved({"model": vit.state_dict() | head}, tmp_path / "mae_finetuned.pth")
    same(path, vit, "pooled")
    assert load_model(str(path)).found.left_over == ("head.bias", "head.weight")


def test_mocov3_is_its_base_encoder_and_its_small_vit_has_twelve_heads(tmp_path: Path) -> None:
    vit, slow = model(embed_dim=384, num_heads=12), model(embed_dim=384, num_heads=12, depth=1)
    state = within(vit.state_dict(), "module.base_encoder.") | within(slow.state_dict(), "module.momentum_encoder.")
    state |= {"module.predictor.0.weight": torch.zeros(2, 2), "module.base_encoder.head.0.weight": torch.zeros(2, 2)}
    path = saved({"epoch": 300, "arch": "vit_small", "state_dict": state}, tmp_path / "vit-s-300ep.pth.tar")
    same(path, vit)
    found = load_model(str(path)).found
    assert "MoCo v3" in found.recognised and "head.0.weight" in found.left_over
    assert len(found.left_over) == len(slow.state_dict()) + 2


def test_dino_is_its_teacher(tmp_path: Path) -> None:
    vit, student = model(), model()
    student.cls_token.data += 1
    content = {
        "student": within(student.state_dict(), "module.backbone."),
        "teacher": within(vit.state_dict(), "backbone.") | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "epoch": 100,
    }
    path = saved(content, tmp_path / "dino_full.pth")
    same(path, vit)
    assert "DINO" in load_model(str(path)).found.recognised
    same(saved(vit.state_dict(), tmp_path / "dino_deitsmall8_pretrain.pth"), vit)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_at_its_own_and_at_another_size(tmp_path: Path, registers: int) -> None:
    name = f"vit_base_patch14_{'reg4_' if registers else ''}dinov2"
    vit = model(name, img_size=56, patch_size=14)
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 64)}
    if registers:
        # The authors' table has a row for the class token; timm adds it to the token.
        row = torch.randn(1, 1, 64)
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - row
        state["register_tokens"] = state.pop("reg_token")
    path = saved(state, tmp_path / "dinov2_vitb14_pretrain.pth")
    same(path, vit)
    larger = model(name, img_size=84, patch_size=14)
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), larger))
    same(path, larger, img_size=84)
    chunks = {n.replace("blocks.", "blocks.0.", 1): value for n, value in state.items()}
    same(saved({"teacher": within(chunks, "backbone.")}, tmp_path / "teacher_checkpoint.pth"), vit)


def test_dinov2_giant_has_gated_feed_forwards(tmp_path: Path) -> None:
    vit = model("vit_giant_patch14_dinov2", img_size=56, patch_size=14, embed_dim=192, num_heads=3)
    state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for n, v in vit.state_dict().items()}
    same(saved(state | {"mask_token": torch.zeros(1, 192)}, tmp_path / "g.pth"), vit)


def test_beit_pre_trained_shares_one_table_of_relative_positions(tmp_path: Path) -> None:
    vit = model("beit_base_patch16_224", num_heads=2, global_pool="token")
    state = vit.state_dict()
    table = "attn.relative_position_bias_table"
    shared = state.pop(f"blocks.0.{table}")
    del state[f"blocks.1.{table}"]
    state |= {"rel_pos_bias.relative_position_bias_table": shared, "mask_token": torch.zeros(1, 1, 64)}
    state |= {"rel_pos_bias.relative_position_index": torch.zeros(17, 17), "lm_head.weight": torch.zeros(5, 64)}
    vit.blocks[1].attn.relative_position_bias_table.data = shared.clone()
    path = saved({"model": state}, tmp_path / "beit_base_patch16_224_pt22k.pth")
    same(path, vit, "mean")
    assert "BEiT" in load_model(str(path)).found.recognised
    assert altsight.load(str(path), img_size=48).features(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).shape == (1, 64)


def test_beit_fine_tuned_has_a_table_in_every_block(tmp_path: Path) -> None:
    vit = model("beit_base_patch16_224", num_heads=2)
    head = {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    same(saved({"model": vit.state_dict() | head}, tmp_path / "beit_ft.pth"), vit, "pooled")


def test_a_file_of_timms_dinov2_with_registers(tmp_path: Path) -> None:
    vit = model("vit_base_patch14_reg4_dinov2", img_size=56, patch_size=14)
    same(saved(vit.state_dict(), tmp_path / "reg4.pth"), vit)


def test_layers_of_another_kind_are_not_passed_over(tmp_path: Path) -> None:
    path = saved(model(qk_norm=True).state_dict(), tmp_path / "qk.pth")
    with pytest.raises(UserError, match=r"'blocks.0.attn.k_norm.bias' in their layers"):
        altsight.load(str(path))


def test_deit_iii(tmp_path: Path) -> None:
    vit = model("deit3_base_patch16_224")
    state = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for n, v in vit.state_dict().items()}
    same(saved({"model": state}, tmp_path / "deit_3_base_224_1k.pth"), vit)


def test_lcl_is_openclips_vit_without_its_projection(tmp_path: Path) -> None:
    vit = model("vit_base_patch16_clip_224")
    names = {"patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "cls_token": "class_embedding"}
    names |= {"norm_pre": "ln_pre", "blocks.": "transformer.resblocks.", "attn.qkv.": "attn.in_proj_"}
    names |= {"attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj"}
    state = {}
    for name, value in vit.state_dict().items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        state[f"module.visual.{name}"] = value.squeeze(0) if name in ("positional_embedding",) else value
    state["module.visual.class_embedding"] = vit.cls_token[0, 0]
    state |= {"module.pool_project.query": torch.zeros(1, 64), "module.lm_head.0.weight": torch.zeros(64)}
    state |= {"module.logit_scale": torch.zeros(()), "module.text.token_embedding.weight": torch.zeros(9, 64)}
    path = saved({"state_dict": state, "epoch": 32}, tmp_path / "lcl_vit_b_16_laion.pt")
    same(path, vit, "mean")
    found = load_model(str(path)).found
    assert "LCL" in found.recognised and len(found.left_over) == 4


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "eva02_tiny_patch14_224"])
def test_a_bare_file_of_another_family_is_found_by_its_shapes(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    view = altsight.load(str(saved(net.state_dict(), tmp_path / "weights.pth")))
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    net.reset_classifier(0)
    with torch.no_grad():
        assert (view.features(images) - net(view.encoder.normalize(images))).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.weight": torch.zeros(3), "b": torch.zeros(2)}, "no kind that is known (the first are 'a.weight', 'b')"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights by name"),
        ([torch.zeros(3)], "holds no weights by name"),
        ({"model": pytest}, "no file of plain tensors"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(tmp_path: Path, content: Any, words: str) -> None:
    if isinstance(content, dict) and content.get("model") is pytest:
        content = {"model": model()}  # a pickled module
    path = saved(content, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        altsight.load(str(path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_what_stands_before_all_names_is_passed_over(tmp_path: Path, prefix: str) -> None:
    theirs = model()
    path = saved({f"{prefix}{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "x.pth")
    assert load_model(str(path)).found.left_over == ()
    named = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    path = saved({f"{prefix}{name}": value for name, value in named.items()}, tmp_path / "named.pth")
    assert load_model(f"timm:vit_tiny_patch16_224={path}").found.left_over == ()


def test_which_of_the_files_in_a_folder_is_read(tmp_path: Path) -> None:
    saved(model().state_dict(), tmp_path / "epoch_1.pth")
    assert load_model(str(tmp_path)).encoder.is_vit
    saved(model().state_dict(), tmp_path / "epoch_9.pth")
    with pytest.raises(UserError, match=r"holds 2 files of weights \(epoch_1.pth, epoch_9.pth\)"):
        load_model(str(tmp_path))
    saved(model().state_dict(), tmp_path / "pytorch_model.bin")
    saved({"lr": 0.1}, tmp_path / "training_args.bin")
    assert load_model(str(tmp_path)).encoder.is_vit
    # As OpenCLIP's folders on the hub are.
    for number, name in enumerate(("open_clip_model", "model")):
        save_file({"w": torch.tensor(number)}, tmp_path / f"{name}.safetensors")
    assert parse(str(tmp_path)).weights["w"] == 0


def test_a_width_that_shows_no_heads_and_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    odd = timm.create_model("vit_tiny_patch16_224", embed_dim=200, num_heads=4, depth=1, num_classes=0)
    with pytest.raises(UserError, match="a ViT 200 wide has"):
        load_model(str(saved(odd.state_dict(), tmp_path / "odd.pth")))
    wide = {"embed_dim": 1408, "num_heads": 16, "mlp_ratio": 48 / 11, "depth": 1, "img_size": 32}  # ViT-g
    giant = timm.create_model("vit_tiny_patch16_224", num_classes=0, **wide).state_dict()
    assert load_model(str(saved(giant, tmp_path / "g.pth"))).encoder.heads == 16
    path = str(saved(model().state_dict(), tmp_path / "x.pth"))
    side = load_model(path).encoder.patch_size
    for size, words in ((-side, "is no size"), (side + 1, "is no whole number of patches")):
        with pytest.raises(UserError, match=f"--img-size {size} {words}"):
            altsight.load(path, img_size=size)


def test_a_file_that_is_cut_or_lacks_weights_is_refused(tmp_path: Path) -> None:
    state = model().state_dict()
    path = saved(state, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    for name in ("cut.pth", "cut.safetensors"):
        with pytest.raises(UserError, match=f"{name}' cannot be read"):
            altsight.load(str(tmp_path / name))
    del state["blocks.1.norm2.weight"]
    with pytest.raises(UserError, match=r"lack 1 of the .*blocks.1.norm2.weight"):
        altsight.load(str(saved(state, tmp_path / "x.pth")))
