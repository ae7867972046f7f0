"""Dual encoders of OpenCLIP: read, written, and equal to the library's own on random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from altsight.hub.load import load_model
from altsight.hub.model import Model

TEXTS = ["a photo of a dog", "", "two red circles; 3 <end_of_text> more", "word " * 100]
VISION = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


NONE: Mapping[str, Any] = {}


def settings(vision: Mapping[str, Any] = NONE, text: Mapping[str, Any] = NONE, **more: Any) -> dict[str, Any]:
    """Return the settings of a small model; a None takes a setting away."""
    both = [
        {k: v for k, v in {**base, **change}.items() if v is not None}
        for base, change in ((VISION, vision), (TEXT, text))
    ]
    return {"embed_dim": 48, "vision_cfg": both[0], "text_cfg": both[1]} | more


TRUNK = {"layers": None, "width": None, "head_width": None, "patch_size": None}
MODELS: dict[str, dict[str, Any]] = {
    "ViT-B-16": settings(),
    "ViT-B-16-quickgelu": settings(quick_gelu=True),
    "ViT-B-32 of OpenAI's text": settings(
        {"patch_size": 32}, {"context_length": 77}, quick_gelu=True, custom_text=True
    ),
    "ViT-g-14": settings({"image_size": 56, "patch_size": 14, "mlp_ratio": 4.3637}, {"mlp_ratio": 3.0}),
    "layer scale": settings({"ls_init_value": 0.5}),
    "CLIPA": settings(
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "last", "no_causal_mask": True, "tokenizer_kwargs": {"clean": "canonicalize"}},
    ),
    "mean of the patches": settings({"pool_type": "avg", "norm_kwargs": {"eps": 1e-6}}, {"pool_type": "first"}),
    "SigLIP": settings(
        TRUNK | {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        | {"act_kwargs": {"approximate": "tanh"}},
        embed_dim=64,
        init_logit_bias=-10,
        custom_text=True,
    ),
    "ConvNeXt": settings(
        TRUNK | {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}, quick_gelu=True
    ),
    "a ResNet of timm": settings(TRUNK | {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}),
    "a ViT of timm, mean": settings(
        TRUNK | {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
    ),
    "a ViT of timm, token": settings(
        TRUNK | {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    ),
}


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with every weight random and none at a value that hides a mistake (zeros, ones)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, tensor in model.state_dict().items():
            if name.startswith("logit_") or not tensor.is_floating_point():
                continue
            spread = tensor.std() if tensor.numel() > 1 and tensor.std() > 0 else torch.tensor(0.1)
            noise = torch.randn_like(tensor) * spread * 0.5
            tensor.add_(noise.abs() if "running_var" in name else noise)
    return model.eval()


def theirs(config: dict[str, Any]) -> Any:
    """Return the library's own model of these settings, with random weights."""
    import open_clip

    kinds = {True: open_clip.CustomTextCLIP, False: open_clip.CLIP}
    config = json.loads(json.dumps(config))
    model = kinds[config.pop("custom_text", False)](**config)
    model.logit_scale.data.fill_(3.7)
    return scrambled(model)


def saved(folder: Path, config: dict[str, Any], model: Any, **more: Any) -> Path:
    """Write the folder that the library writes for the hub."""
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": more}))
    return folder


def pixels(size: int) -> Tensor:
    """Return images (3, 3, size, size) as an encoder takes them, normalised."""
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def vectors(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the un-normalised vectors of images and of `TEXTS`."""
    assert model.text is not None
    model.eval()
    return model.embed_image(model.encoder(images)), model.text(model.text.encode(TEXTS))


@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_are_the_librarys(name: str, tmp_path: Path) -> None:
    import open_clip

    config = MODELS[name]
    other = theirs(config)
    folder = saved(tmp_path / "model", config, other)
    model = load_model(str(folder))
    images = pixels(model.encoder.config.img_size)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.inference_mode():
        wanted = other.encode_image(images), other.encode_text(ids)
        logits = other.get_logits(images, ids)[0]
    image, text = vectors(model, images)
    torch.testing.assert_close(image, wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, wanted[1], atol=1e-5, rtol=0)
    unit = [torch.nn.functional.normalize(part, dim=-1) for part in (image, text)]
    ours = model.logit_scale * unit[0] @ unit[1].T + model.logit_bias
    torch.testing.assert_close(ours / model.logit_scale, logits / model.logit_scale, atol=1e-5, rtol=0)
    assert model.found.left_over == model.found.missing == ()
    assert image.std() > 0.01, "vectors that are all alike would agree with anything"
