"""Single encoders of transformers: the same tokens as transformers computes, from the folders that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import altsight
from altsight.core.errors import UserError
from altsight.hub.load import load_model

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def saved(kind: str, folder: Path, head: str = "Model", **changes: Any) -> Any:
    """Return a tiny model of transformers with seeded weights that was saved to `folder` with its image processor."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZE | changes))
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3, size=size).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ViT", {"intermediate_size": 128}),
        ("ViT", {"intermediate_size": 72}),
        ("ViTMAE", {"intermediate_size": 128, "mask_ratio": 0.0}),
        ("Dinov2", {}),
        ("Dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 4, "hidden_size": 192}),
        ("Dinov2WithRegisters", {}),
    ],
)
def test_the_same_features_as_transformers(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    theirs = saved(kind, tmp_path, **changes)
    view = altsight.load(tmp_path)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 0]
    assert view.feature_point == "cls" and view.preprocess.squash
    assert (view.features(images) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_beit(tmp_path: Path, shared: bool) -> None:
    tables = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    theirs = saved("Beit", tmp_path, intermediate_size=128, use_mean_pooling=True, **tables)
    view = altsight.load(tmp_path)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((images / 255 - 0.4) / 0.3).pooler_output
    assert (view.features(images) - expected).abs().max() <= 1e-5


def test_decoders_and_classifiers_are_left_over(tmp_path: Path) -> None:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}
    saved("ViTMAE", tmp_path / "mae", "ForPreTraining", intermediate_size=128, decoder_num_attention_heads=2, **decoder)
    left = load_model(str(tmp_path / "mae")).found.left_over
    assert left and all(name.startswith("decoder.") for name in left)
    saved("ViT", tmp_path / "vit", "ForImageClassification", intermediate_size=128)
    assert load_model(str(tmp_path / "vit")).found.left_over == ("classifier.bias", "classifier.weight")


def test_dinov2_cuts_its_images_smaller_than_it_is_and_as_much_of_them_at_any_size(tmp_path: Path) -> None:
    """As on the hub: a model of 518 pixels whose images are resized to 256 and cut to 224; here 32, 16, 14."""
    saved("Dinov2", tmp_path)
    cut = {"height": 14, "width": 14}
    transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size=cut).save_pretrained(tmp_path)
    preprocess = load_model(str(tmp_path)).preprocess
    assert (preprocess.size, preprocess.crop_ratio, preprocess.squash) == (32, 0.875, False)
    transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size=cut, do_center_crop=False).save_pretrained(
        tmp_path
    )
    assert load_model(str(tmp_path)).preprocess.crop_ratio == 1
    transformers.BitImageProcessor(resample=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="resample = 1"):
        load_model(str(tmp_path))


def test_settings_that_lack_something_are_refused(tmp_path: Path) -> None:
    saved("ViT", tmp_path, intermediate_size=128)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"not as their kind has them \(KeyError: 'num_attention_heads'"):
        altsight.load(tmp_path)
    with pytest.raises(UserError, match="both a name on the hub and a file"):
        altsight.load(f"hf:some/name={tmp_path}")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    saved("ViT", tmp_path / "relu", intermediate_size=128, hidden_act="relu")
    with pytest.raises(UserError, match="activation 'relu'"):
        altsight.load(tmp_path / "relu")
    transformers.ResNetConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="'resnet'"):
        altsight.load(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be fetched"):
        altsight.load("hf:nobody/nothing-of-the-kind")
