"""Models of timm: their features, their preprocessing, and what is said where one cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from timm.models import save_for_hf

import altsight
from altsight.core.errors import UserError
from altsight.data.views import normalization_of, statistics
from altsight.hub.load import load_model
from altsight.nn.encoder import Encoder, EncoderConfig

FAMILIES = [
    "resnet18",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "deit_tiny_distilled_patch16_224",
    "mixer_s32_224",
    "efficientnet_b0",
]


def images(size: int, count: int = 2) -> torch.Tensor:
    """Return seeded uint8 images."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_features_as_timm(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    view = altsight.load(f"timm:{name}={tmp_path / 'weights.pth'}")
    left = load_model(f"timm:{name}={tmp_path / 'weights.pth'}").found.left_over
    assert (left or name.startswith("eva")) and all(
        "head" in part or "fc" in part or "classifier" in part for part in left
    )
    theirs.reset_classifier(0)
    config = timm.data.resolve_model_data_config(theirs)
    given = images(view.preprocess.size)
    mean, std = (torch.tensor(config[part]).view(3, 1, 1) for part in ("mean", "std"))
    with torch.no_grad():
        assert (view.features(given) - theirs((given / 255 - mean) / std)).abs().max() <= 1e-5
    assert config["input_size"][-1] == view.preprocess.size and config["crop_pct"] == view.preprocess.crop_ratio
    assert config["interpolation"] == view.preprocess.interpolation


def test_a_size_that_the_patches_do_not_divide_is_as_timm_has_it() -> None:
    small: dict[str, Any] = {"width": 64, "depth": 1, "heads": 2}
    encoder = Encoder(EncoderConfig("vit_so400m_patch14_siglip_384", 384, positions="learned", **small)).eval()
    pixels = torch.rand(1, 3, 384, 384)
    with torch.no_grad():
        encoded = encoder(pixels)
        assert encoder.num_patches == encoded.patches.shape[1] == 27 * 27
        assert torch.equal(encoder.point(encoded, "pooled"), encoder.backbone(pixels))


def test_a_folder_that_timm_saved_at_its_size_and_at_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, embed_dim=96, num_heads=3).eval()
    arguments = {"img_size": 56, "depth": 2, "embed_dim": 96, "num_heads": 3}
    save_for_hf(theirs, tmp_path / "folder", model_args=arguments, safe_serialization=True)
    view = altsight.load(tmp_path / "folder", img_size=56)
    with torch.no_grad():
        expected = theirs.forward_features(view.encoder.normalize(images(56)))[:, 0]
    assert (view.features(images(56)) - expected).abs().max() <= 1e-5
    larger = altsight.load(tmp_path / "folder", img_size=84)
    assert larger.preprocess.size == 84 and larger.features(images(84)).shape == (2, 96)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_tables_of_relative_positions_take_another_size_as_timm_does_it(name: str) -> None:
    from altsight.nn.resample import resized

    small: dict[str, Any] = {"width": 64, "depth": 1, "heads": 2} if "beit" in name else {}
    encoder = Encoder(EncoderConfig(name, positions="learned", **small)).eval()
    larger = resized(encoder, img_size=256).eval()
    with torch.no_grad():
        pixels = torch.rand(1, 3, 256, 256)
        assert (larger.point(larger(pixels), "pooled") - larger.backbone(pixels)).abs().max() <= 1e-5
    ours, theirs = encoder.backbone.state_dict(), larger.backbone.state_dict()
    table = next(part for part in ours if part.endswith("relative_position_bias_table"))
    assert ours[table].shape != theirs[table].shape or "swin" in name
    same = [part for part in ours if "relative_position" not in part and "attn_mask" not in part]
    assert all(torch.equal(ours[part], theirs[part]) for part in same)


def test_preprocessing_is_that_of_timms_own_transform() -> None:
    from timm.data import create_transform

    from altsight.evals.base import Preprocess

    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((300, 200))
    for mode, interpolation in (("center", "bicubic"), ("squash", "bicubic"), ("center", "bilinear")):
        transform = create_transform((3, 64, 64), interpolation=interpolation, crop_pct=0.875, crop_mode=mode)
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in statistics("imagenet"))
        theirs = (transform(picture) * std + mean) * 255
        preprocess = Preprocess(64, "imagenet", 0.875, interpolation, squash=mode == "squash")
        ours = preprocess(_png(picture)).float()
        # Pillow and PyTorch round differently.
        assert (ours - theirs).abs().max() <= 2 and (ours - theirs).abs().mean() < 0.5


def _png(picture: PIL.Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_statistics_without_a_name() -> None:
    name = normalization_of((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert statistics(name) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert normalization_of((0.5,) * 3, (0.5,) * 3) == "half"
    for wrong in ("clpi", "1,2,3", "1,2/3,4,5"):
        with pytest.raises(UserError, match="no normalization"):
            statistics(wrong)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("timm:vit_bas_patch16_224", "Did you mean 'vit_base_patch16_224'"),
        ("timm:vit_base_patch16_224.moe", "mae"),
        ("timm:", "names no model"),
        ("timm:resnet18=nowhere.pth", "no weights at"),
    ],
)
def test_wrong_names_are_refused_in_one_line(source: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        altsight.load(source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    with torch.device("meta"):
        parallel = timm.create_model("vit_small_patch16_18x2_224").state_dict()
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in parallel.items()}, tmp_path / "18x2.pth")
    with pytest.raises(UserError, match="a ViT of a kind"):
        altsight.load(f"timm:vit_small_patch16_18x2_224={tmp_path / '18x2.pth'}")
    for name in ("pit_ti_224", "vit_tiny_patch16_224"):
        torch.save(timm.create_model(name).state_dict(), tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="does not hand out its tokens"):
        altsight.load(f"timm:pit_ti_224={tmp_path / 'pit_ti_224.pth'}")
    with pytest.raises(UserError, match=r"'cls_token' in .* is .*192.*384.*another model"):
        altsight.load(f"timm:vit_small_patch16_224={tmp_path / 'vit_tiny_patch16_224.pth'}")
    with pytest.raises(UserError, match="takes images of one size only"):
        torch.save(timm.create_model("cait_xxs24_224").state_dict(), tmp_path / "cait.pth")
        altsight.load(f"timm:cait_xxs24_224={tmp_path / 'cait.pth'}", img_size=256)
