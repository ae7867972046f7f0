"""Where dual encoders come from and go to: files of OpenAI's and OpenCLIP's, other sizes, other libraries; errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import altsight
from altsight.core.errors import UserError
from altsight.evals.load import view_of
from altsight.hub import huggingface_write, openclip_write
from altsight.hub.guess import heads_of
from altsight.hub.load import load_model
from altsight.hub.model import Model
from altsight.methods.align import ALIGN
from altsight.methods.clip import CLIP
from altsight.methods.composite import Composite, Part
from altsight.methods.flip import FLIP
from altsight.methods.siglip import SigLIP
from altsight.nn.language import BertTowerConfig
from altsight.nn.resample import resized
from altsight.nn.text import TextConfig
from altsight.transfer.base import ImageTower, with_view
from tests.hub.test_huggingface_dual import MODELS as HF
from tests.hub.test_openclip import ENCODER, MODELS, OWN_TEXT, pixels, saved, settings, theirs, trained, vectors
from tests.hub.test_tokenizers import difficult

TEXTS = ["a photo of a dog", "", "two red circles!"]
WIDE = settings({"width": 128, "head_width": 64}, {"width": 128, "heads": 2})
"""Heads of 64 channels, which OpenAI's and OpenCLIP's own models have: they do not show in the weights."""


def equal(model: Model, other: Any) -> None:
    """Check that `model` gives the vectors of OpenCLIP's `other`."""
    import open_clip

    images = pixels(model.encoder.config.img_size)
    image, text = vectors(model, images)
    with torch.inference_mode():
        ids = open_clip.tokenize(["a photo of a dog", "", "two red circles; 3 <end_of_text> more", "word " * 100], 20)
        torch.testing.assert_close(image, other.encode_image(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(text, other.encode_text(ids), atol=1e-5, rtol=0)


def test_openais_archive_is_read_with_its_activation(tmp_path: Path) -> None:
    other = theirs(WIDE | {"quick_gelu": True})
    for name, value in (("input_resolution", 64), ("context_length", 20), ("vocab_size", 49408)):
        if hasattr(other, name):
            delattr(other, name)
        other.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": pixels(64), "encode_text": torch.ones(1, 20, dtype=torch.long)}
    torch.jit.trace_module(other, inputs, check_trace=False).save(str(tmp_path / "ViT-B-16.pt"))
    model = load_model(str(tmp_path / "ViT-B-16.pt"))
    assert model.found.recognised.startswith("OpenAI's CLIP")
    # Numbers and the causal mask, which need not be read.
    assert model.found.left_over == ("attn_mask", "context_length", "input_resolution", "vocab_size")
    assert model.encoder.config.quick_gelu and model.encoder.heads == 2
    assert model.preprocess.normalization == "clip"
    equal(model, other)


def test_the_heads_of_every_vit_of_open_clip_show_in_its_width() -> None:
    import open_clip

    visions = [open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()]
    own = [vision for vision in visions if isinstance(vision.get("layers"), int) and "timm_model_name" not in vision]
    assert {heads_of(vision["width"]) * vision.get("head_width", 64) - vision["width"] for vision in own} == {0}
    assert {vision.get("head_width", 64) for vision in own} >= {64, 80, 88, 104}


def test_a_bare_file_with_wide_heads_is_read(tmp_path: Path) -> None:
    wide = {"width": 1280, "head_width": 80, "layers": 1, "image_size": 32}
    other = theirs(settings(wide, {"width": 128, "heads": 2}))
    torch.save(other.state_dict(), tmp_path / "vit_h.pt")
    model = load_model(str(tmp_path / "vit_h.pt"))
    assert model.encoder.heads == 16
    equal(model, other)


def test_the_image_side_of_clip_is_written_for_timm(tmp_path: Path) -> None:
    """Its layer norms add 1e-5, and its feed-forward is as wide as it likes."""
    torch.save(theirs(WIDE).state_dict(), tmp_path / "plain.pt")
    wide = settings({"width": 128, "head_width": 64, "mlp_ratio": 2.5}, {"width": 128, "heads": 2})
    torch.save(theirs(wide).state_dict(), tmp_path / "wide.pt")
    for name in ("plain", "wide"):
        done = altsight.export(tmp_path / f"{name}.pt", to="timm", out=tmp_path / name)
        assert max(done.differences.values()) <= 1e-6
        before, after = altsight.load(tmp_path / f"{name}.pt"), altsight.load(tmp_path / name)
        assert (before.features(pixels(64)) - after.features(pixels(64))).abs().max() <= 1e-6


def test_openais_resnet_is_read_off_its_shapes(tmp_path: Path) -> None:
    size = {"layers": [3, 4, 6, 3], "width": 64, "head_width": 64, "patch_size": None, "image_size": 224}
    other = theirs(settings(size, {"width": 128}, quick_gelu=True, embed_dim=1024))
    marks = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(20)}
    torch.save(dict(other.state_dict()) | marks, tmp_path / "RN50.pt")
    model = load_model(str(tmp_path / "RN50.pt"))
    assert model.encoder.config.model == "resnet50_clip" and model.joint_point == "pooled"
    assert model.found.left_over == ("context_length", "input_resolution") and model.found.missing == ()
    equal(model, other)


@pytest.mark.parametrize("custom", [False, True])
def test_a_checkpoint_of_open_clips_training_is_read(custom: bool, tmp_path: Path) -> None:
    other = theirs(WIDE | {"custom_text": custom})
    state = {f"module.{name}": value for name, value in other.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    model = load_model(str(tmp_path / "epoch_3.pt"))
    assert "exact GELU" in model.found.recognised and model.found.left_over == ()
    equal(model, other)


def test_half_precision_becomes_full(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in theirs(WIDE).state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path / "model.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.encoder.backbone.cls_token.flatten(), state["visual.class_embedding"].float())


def test_a_file_takes_its_settings_from_the_model_that_is_named(tmp_path: Path) -> None:
    import open_clip

    # The smallest of the library's models; its image side of timm does not show in its weights.
    name = "ViT-S-32-alt"
    other = open_clip.create_model(name).eval()
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    model = load_model(f"open_clip:{name}={tmp_path / 'weights.safetensors'}")
    assert model.found.recognised == f"OpenCLIP's {name}"
    images = pixels(224)
    with torch.inference_mode():
        torch.testing.assert_close(vectors(model, images)[0], other.encode_image(images), atol=1e-5, rtol=0)


def test_another_size_is_resampled_as_open_clip_does(tmp_path: Path) -> None:
    import open_clip

    folder = saved(tmp_path / "model", MODELS["ViT-B-16"], theirs(MODELS["ViT-B-16"]))
    model = load_model(str(folder), img_size=96)
    other = open_clip.create_model(f"local-dir:{folder}", force_image_size=96).eval()
    assert model.preprocess.size == 96
    images = pixels(96)
    with torch.inference_mode():
        torch.testing.assert_close(vectors(model, images)[0], other.encode_image(images), atol=1e-5, rtol=0)


def test_preprocessing_is_read(tmp_path: Path) -> None:
    other = theirs(MODELS["ViT-B-16"])
    how = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    preprocess = load_model(str(saved(tmp_path / "model", MODELS["ViT-B-16"], other, **how))).preprocess
    assert (preprocess.size, preprocess.normalization) == (64, "half")
    assert (preprocess.interpolation, preprocess.squash) == ("bilinear", True)


@torch.inference_mode()
def both(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors of images and of `TEXTS`."""
    assert model.text is not None
    return model.eval().embed_image(model.encoder(images)), model.text(model.text.encode(TEXTS))


@pytest.mark.parametrize("source", ["ViT-B-16-quickgelu", "mean of the patches, read at the end", "CLIP", "SigLIP"])
def test_models_of_one_library_go_to_the_other(source: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if source in HF:
        make, vision, text = HF[source]
        make(tmp_path, vision, text)
        model, writer = load_model(str(tmp_path)), openclip_write
    else:
        config = settings({"pool_type": "avg", "no_ln_pre": True}) if source not in MODELS else MODELS[source]
        model, writer = load_model(str(saved(tmp_path / "in", config, theirs(config)))), huggingface_write  # type: ignore[assignment]
    if source == "SigLIP":
        with pytest.raises(UserError, match="OpenCLIP cannot hold this model"):
            writer.write(model.view("model"), tmp_path / "out")
        return
    if source.startswith("mean"):
        with pytest.raises(UserError, match="cannot name the 1e-05 in the layer norms"):
            writer.write(model.view("model"), tmp_path / "out")
        return
    writer.write(model.view("model"), tmp_path / "out")
    other = writer.load_back(tmp_path / "out")
    image, words = both(model, pixels(64))
    torch.testing.assert_close(other.image(pixels(64)), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.text(TEXTS), words, atol=1e-5, rtol=0)


@pytest.mark.parametrize("writer", [openclip_write, huggingface_write])
def test_the_usage_that_is_printed_runs(writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CLIP.Config(TextConfig(64, 2, 2, 20), 48)
    encoder = replace(ENCODER, quick_gelu=True)
    view = view_of(trained(CLIP, config, encoder), "run")
    writer.write(view, tmp_path)
    assert max(writer.compare(view, tmp_path).values()) < 1e-5
    assert "altsight" not in writer.usage(view, str(tmp_path))
    exec(writer.usage(view, str(tmp_path)), {})
    assert capsys.readouterr().out.startswith("tensor([[")


@pytest.mark.parametrize("writer", [openclip_write, huggingface_write])
def test_the_comparison_finds_what_is_wrong(writer: Any, tmp_path: Path) -> None:
    config = CLIP.Config(TextConfig(64, 2, 2, 20, quick_gelu=False), 48)
    method = trained(CLIP, config, ENCODER)
    writer.write(view_of(method, "run"), tmp_path)
    for name, what in (("text.ln_final.bias", "text vectors"), ("encoder.backbone.pos_embed", "image vectors")):
        parameter = method.get_parameter(name)
        before = parameter.detach().clone()
        parameter.data += 0.1 * torch.randn(before.shape)
        assert writer.compare(view_of(method, "run"), tmp_path)[what] > 1e-3
        parameter.data.copy_(before)
    wrong = replace(view_of(method, "run"), logit_bias=-3.0)
    assert writer.compare(wrong, tmp_path)["logits"] > 1e-3


RUNS: dict[str, tuple[Any, Any, str, str]] = {
    "flip": (
        FLIP,
        FLIP.Config(text=TextConfig(64, 2, 2, 20, False), embed_dim=48),
        "only Altsight has",
        "only Altsight",
    ),
    "align": (ALIGN, ALIGN.Config(text=BertTowerConfig(64, 2, 2, 20)), "no text tower like this", "no text tower like"),
    "siglip": (
        SigLIP,
        SigLIP.Config(TextConfig(64, 2, 2, 20, False, causal=False, pool="last", pad_with_end=True)),
        "builds 'vit_tiny_patch16_224' at timm's own size only",
        "no bias on its logits",
    ),
    "clip": (CLIP, CLIP.Config(OWN_TEXT, 48), "share one activation, and here it is GELU for images", ""),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_library_cannot_hold_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    kind, config, *reasons = RUNS[name]
    view = view_of(trained(kind, config, ENCODER), name)
    for writer, reason in zip((openclip_write, huggingface_write), reasons, strict=True):
        if reason:
            with pytest.raises(UserError, match=reason) as error:
                writer.write(view, tmp_path)
            assert "\n" not in str(error.value)
            assert not list(tmp_path.iterdir()), "nothing is half-written"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a text tower of transformers": (
        settings(text={"hf_model_name": "roberta-base"}),
        "'roberta-base' of transformers",
    ),
    "CoCa": (settings(multimodal_cfg={"width": 64}), "is OpenCLIP's CoCa"),
    "a ResNet that is not OpenAI's": (settings({"layers": [1, 1, 1, 1]}), r"no ResNet with \(1, 1, 1, 1\) blocks"),
    "an attention of another kind": (settings({"qk_norm": True}), r"vision_cfg.qk_norm = True has no counterpart"),
    "a class token of the text": (settings(text={"embed_cls": True}), r"text_cfg.embed_cls = True has no counterpart"),
    "an end that is not the tokenizer's": (settings(text={"pool_type": "eos", "eos_id": 7}), "do not belong together"),
    "another width": (settings({"width": 32, "head_width": 32}), "do not fit what they were recognised as"),
    "more layers": (settings({"layers": 3}), "lack 12 tensors"),
    "a pooling of its own": (
        settings({"timm_model_name": "test_resnet", "timm_pool": "abs_attn"}),
        "pooling 'abs_attn' with the head 'linear'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_known_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    config, reason = WRONG[name]
    folder = saved(tmp_path / "model", config, theirs(settings()))
    with pytest.raises(UserError, match=reason) as error:
        altsight.load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("open_clip:ViT-B-33/openai", "OpenCLIP has no model 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        ("open_clip:ViT-S-32-alt/nothing", "cannot fetch 'ViT-S-32-alt/nothing'"),
        ("open_clip:ViT-S-32-alt", "cannot fetch 'ViT-S-32-alt'"),
        ("hf:nobody/nothing", "cannot be fetched from the Hugging Face hub"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_line(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=reason) as error:
        altsight.load(source)
    assert "\n" not in str(error.value)


def test_a_view_of_read_weights_gives_unit_vectors(tmp_path: Path) -> None:
    view = altsight.load(saved(tmp_path / "model", MODELS["ViT-B-16"], theirs(MODELS["ViT-B-16"])))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for vectors_ in (view.encode_image(images), view.encode_text(TEXTS)):
        torch.testing.assert_close(vectors_.norm(dim=-1), torch.ones(len(vectors_)))
    assert view.is_dual and isinstance(view.project, nn.Linear) and view.feature_point == "cls"
    assert json.loads((tmp_path / "model" / "open_clip_config.json").read_text())["preprocess_cfg"] == {}


def test_the_image_tower_of_read_weights_can_be_tuned(tmp_path: Path) -> None:
    view = altsight.load(saved(tmp_path / "model", MODELS["ViT-B-16"], theirs(MODELS["ViT-B-16"])))
    tower, images = ImageTower(view), pixels(64)
    assert view.embed_image is not None
    with torch.no_grad():
        expected = view.embed_image(view.encoder(images))
    torch.testing.assert_close(tower(tower.encoder(images)), expected)
    trained_ = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert any("image_projection" in name for name in trained_) and not any(".text." in name for name in trained_)


def test_a_tuned_encoder_is_what_is_written(tmp_path: Path) -> None:
    view = altsight.load(saved(tmp_path / "model", MODELS["ViT-B-16"], theirs(MODELS["ViT-B-16"])))
    tuned = with_view(view, resized(view.encoder, img_size=96))
    tuned.encoder.backbone.norm.bias.data += 0.1
    (tmp_path / "out").mkdir()
    openclip_write.write(tuned, tmp_path / "out")
    assert max(openclip_write.compare(tuned, tmp_path / "out").values()) < 1e-5
    assert altsight.load(tmp_path / "out").preprocess.size == 96


@pytest.mark.parametrize("writer", [openclip_write, huggingface_write])
def test_the_tokenizer_of_a_corpus_gives_the_same_ids_elsewhere(writer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    view = view_of(trained(CLIP, CLIP.Config(replace(OWN_TEXT, quick_gelu=False), 48), ENCODER), "run")
    writer.write(view, tmp_path)
    assert view.text is not None
    ours, last = view.text.tokenizer, view.text.tokenizer.vocab_size - 1
    # The name of a special token in a text is the token for the others.
    texts = [text for text in difficult() if not any(name in text.lower() for name in ("<pad>", "<start>", "<end>"))]
    fast = AutoTokenizer.from_pretrained(tmp_path)
    ids = fast(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if writer is huggingface_write:
        # There the end token has changed numbers with the last one.
        ids = torch.where(ids == last, ours.end, torch.where(ids == ours.end, last, ids))
    assert torch.equal(ids, view.text.encode(texts))


def test_the_dual_encoder_of_a_composite_is_written(tmp_path: Path) -> None:
    text = {"width": 64, "heads": 2, "layers": 2, "context": 20}
    config = Composite.Config((Part("simclr"), Part("clip", settings={"text": text, "embed_dim": 48})))
    method = trained(Composite, config, ENCODER)
    view = view_of(method, "both")
    assert view.logit_scale == pytest.approx(method.get_parameter("parts.clip.logit_scale").exp().item())
    huggingface_write.write(view, tmp_path)
    assert max(huggingface_write.compare(view, tmp_path).values()) < 1e-5
