"""Dual encoders of OpenCLIP: read, written, and equal to the library's own on random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from altsight.core.rng import key
from altsight.data.text import train_tokenizer
from altsight.evals.load import view_of
from altsight.hub.dual import position_table
from altsight.hub.load import load_model
from altsight.hub.model import Model
from altsight.hub.openclip_write import load_back, write
from altsight.methods.base import Corpus, Method
from altsight.methods.clip import CLIP
from altsight.methods.lit import LiT
from altsight.methods.siglip import SigLIP
from altsight.methods.slip import SLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig

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


def state_of(model: Model) -> dict[str, Tensor]:
    """Return the weights, the bias of the patches within the positions, where OpenCLIP's own tower has it."""
    state = dict(model.state_dict())
    if model.encoder.is_vit:
        state.pop("encoder.backbone.patch_embed.proj.bias", None)
        state["encoder.backbone.pos_embed"] = position_table(model.encoder)
    return state


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ConvNeXt"])
def test_what_was_read_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    first = load_model(str(saved(tmp_path / "first", MODELS[name], theirs(MODELS[name]))))
    (tmp_path / "second").mkdir()
    write(first.view("first"), tmp_path / "second")
    second = load_model(str(tmp_path / "second"))
    a, b = state_of(first), state_of(second)
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]
    assert (second.preprocess, second.joint_point) == (first.preprocess, first.joint_point)
    assert second.logit_scale == pytest.approx(first.logit_scale) and second.logit_bias == first.logit_bias
    assert first.text is not None and second.text is not None
    assert second.text.tokenizer.rules == first.text.tokenizer.rules


ENCODER = EncoderConfig("vit_tiny_patch16_224", img_size=64, width=64, depth=2, heads=2)
OWN_TEXT = TextConfig(width=64, heads=2, layers=2, context=20)
FULL = EncoderConfig("test_vit", img_size=160)
RUNS: dict[str, tuple[type[Method], Any, EncoderConfig]] = {
    "clip, the papers' towers": (CLIP, CLIP.Config(OWN_TEXT, 48), replace(ENCODER, quick_gelu=True, pre_norm=True)),
    "clip with the exact GELU": (CLIP, CLIP.Config(replace(OWN_TEXT, quick_gelu=False), 48), ENCODER),
    "clip with layer scale": (
        CLIP,
        CLIP.Config(replace(OWN_TEXT, quick_gelu=False), 48),
        replace(ENCODER, layer_scale=0.1, positions="learned"),
    ),
    "clip with a model of timm": (CLIP, CLIP.Config(OWN_TEXT, 48), FULL),
    "slip with a ResNet": (SLIP, SLIP.Config(text=OWN_TEXT, embed_dim=48), EncoderConfig("test_resnet", img_size=64)),
    "lit": (LiT, LiT.Config(text=replace(OWN_TEXT, quick_gelu=False)), ENCODER),
    "siglip": (
        SigLIP,
        SigLIP.Config(replace(OWN_TEXT, quick_gelu=False, causal=False, pool="last", pad_with_end=True)),
        EncoderConfig("vit_tiny_patch16_224"),
    ),
}


def trained(kind: type[Method], config: Any, encoder: EncoderConfig) -> Method:
    """Return a method with random weights, over a tokenizer of its own."""
    tokenizer = train_tokenizer(iter([*TEXTS, "the quick brown fox"] * 5), 400)
    method = kind(config, Encoder(encoder), Corpus(tokenizer))
    method.init_weights(key(0, 0, "test"))
    scrambled(method)
    for name, value in (("logit_scale", 3.1), ("log_scale", 2.2), ("bias", -6.0)):
        if hasattr(method, name):
            getattr(method, name).data.fill_(value)
    return method.eval()


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_what_open_clip_makes_of_their_export(name: str, tmp_path: Path) -> None:
    view = view_of(trained(*RUNS[name]), "run")
    assert math.log(view.logit_scale) == pytest.approx(3.1 if RUNS[name][0] in (CLIP, SLIP) else 2.2)
    write(view, tmp_path)
    other = load_back(tmp_path)
    images = pixels(view.preprocess.size)
    assert view.text is not None and view.embed_image is not None
    with torch.inference_mode():
        image, text = view.embed_image(view.encoder(images)), view.text(view.text.encode(TEXTS))
    torch.testing.assert_close(other.image(images), image, atol=1e-5, rtol=0)
    # OpenCLIP cleans texts of its own accord, and always takes the name of a token for the token.
    torch.testing.assert_close(other.text(TEXTS), text, atol=1e-5, rtol=0)
    assert other.scale == pytest.approx(view.logit_scale) and other.bias == pytest.approx(view.logit_bias)
