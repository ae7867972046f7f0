"""Dual encoders of transformers: read, written, and equal to the library's own on random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from altsight.core.errors import UserError
from altsight.evals.load import view_of
from altsight.hub.huggingface_write import load_back, write
from altsight.hub.load import load_model
from altsight.hub.model import Model
from altsight.methods.base import Method
from altsight.methods.clip import CLIP
from altsight.methods.siglip import SigLIP
from altsight.nn.encoder import EncoderConfig
from tests.hub.test_openclip import ENCODER, OWN_TEXT, scrambled, trained
from tests.hub.test_openclip import RUNS as OPENCLIP_RUNS
from tests.hub.test_tokenizers import PIECES, difficult

TEXTS = ["a photo of a dog", "", "two red circles; 3 more", "word " * 100]
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZE | {"image_size": 64, "patch_size": 16}
WORDS = 600


def clip_tokenizer_folder(folder: Path) -> None:
    """Write a CLIP tokenizer of transformers: the 256 bytes, the same at a word's end, some merges, start and end."""
    from transformers import CLIPTokenizer

    from altsight.hub.clip_tokenizer import _byte_names, _merges

    letters = list(_byte_names().values())
    merges = _merges()[:5000]
    words = [
        *letters,
        *(f"{x}</w>" for x in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(dict.fromkeys(words))}, merges, model_max_length=20)
    tokenizer.save_pretrained(folder)


def siglip_tokenizer_folder(folder: Path) -> None:
    """Write a tokenizer like SigLIP's, in its fast form: pieces of sentences, an end and no start."""
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0)], 0))
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=WORDS, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(PIECES, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=16
    )
    fast.save_pretrained(folder)


def siglip2_tokenizer_folder(folder: Path) -> None:
    """Write a tokenizer like SigLIP 2's: lower case, bytes for unknown letters, padding before the text."""
    from transformers import Siglip2Tokenizer

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = ("▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'")
    merges = [("t", "h"), ("th", "e"), ("o", "f"), ("▁", "the")]
    words = (*special, *letters, *(f"<0x{byte:02X}>" for byte in range(256)), *("".join(merge) for merge in merges))
    tokenizer = Siglip2Tokenizer(dict(zip(words, range(len(words)), strict=True)), merges, add_eos_token=True)
    frame = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.save_pretrained(folder)


def clip(folder: Path, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """Write and return a small CLIP of the library's, with its tokenizer and its image processor."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    clip_tokenizer_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | {"max_position_embeddings": 20}
    config = CLIPConfig(text_config=SIZE | ids | text, vision_config=VISION | vision, projection_dim=48)
    model = scrambled(CLIPModel(config))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    return model


def siglip(folder: Path, vision: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """Write and return a small SigLIP of the library's, with its tokenizer and its image processor."""
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    siglip_tokenizer_folder(folder)
    language = SIZE | {"vocab_size": len(AutoTokenizer.from_pretrained(folder)), "max_position_embeddings": 16} | text
    model = scrambled(SiglipModel(SiglipConfig(text_config=language, vision_config=VISION | vision)))
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-7.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return model


MODELS: dict[str, tuple[Any, Mapping[str, Any], Mapping[str, Any]]] = {
    "CLIP": (clip, {}, {}),
    "CLIP with two activations": (clip, {"hidden_act": "gelu", "patch_size": 32}, {"hidden_act": "quick_gelu"}),
    "CLIP of before the end token was put right": (clip, {"layer_norm_eps": 1e-6}, {"eos_token_id": 2}),
    "SigLIP": (siglip, {}, {}),
    "SigLIP with the exact GELU": (siglip, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "layer_norm_eps": 1e-5}),
    "SigLIP with a joint space of its own": (
        siglip,
        {"intermediate_size": 139},
        {"projection_size": 64, "hidden_size": 32},
    ),
}


RUNS: dict[str, tuple[type[Method], Any, EncoderConfig]] = {
    **{name: run for name, run in OPENCLIP_RUNS.items() if name != "siglip"},
    "clip with two activations and registers": (CLIP, CLIP.Config(OWN_TEXT, 48), replace(ENCODER, registers=2)),
    "clip without positions": (CLIP, CLIP.Config(OWN_TEXT, 48), replace(ENCODER, positions="none")),
    "clip on the encoder of a SigLIP": (
        CLIP,
        CLIP.Config(OWN_TEXT, 48),
        replace(ENCODER, model="vit_base_patch16_siglip_224"),
    ),
    "siglip without a class token": (
        SigLIP,
        SigLIP.Config(replace(OWN_TEXT, quick_gelu=False, causal=False, pool="last", pad_with_end=True)),
        replace(ENCODER, model="vit_base_patch16_siglip_gap_224"),
    ),
}


@torch.inference_mode()
def vectors(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the un-normalised vectors of images and of `TEXTS`."""
    assert model.text is not None
    model.eval()
    return model.embed_image(model.encoder(images)), model.text(model.text.encode(TEXTS))


@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_are_the_librarys(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make, vision, text = MODELS[name]
    other = make(tmp_path, vision, text)
    model = load_model(str(tmp_path))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        image = other.get_image_features(images).pooler_output
        words = other.get_text_features(ids).pooler_output
        logits = other(input_ids=ids, pixel_values=images).logits_per_image
    ours = vectors(model, images)
    torch.testing.assert_close(ours[0], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], words, atol=1e-5, rtol=0)
    unit = [torch.nn.functional.normalize(part, dim=-1) for part in ours]
    scores = model.logit_scale * unit[0] @ unit[1].T + model.logit_bias
    torch.testing.assert_close(scores / model.logit_scale, logits / model.logit_scale, atol=1e-5, rtol=0)
    assert model.found.left_over == model.found.missing == ()
    assert image.std() > 0.01 and words.std() > 0.01, "vectors that are all alike would agree with anything"


@pytest.mark.parametrize("make", [clip_tokenizer_folder, siglip_tokenizer_folder, siglip2_tokenizer_folder])
def test_tokens_are_the_librarys(make: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from altsight.hub.hf_tokenizer import hf_tokenizer

    make(tmp_path)
    other, ours = AutoTokenizer.from_pretrained(tmp_path), hf_tokenizer(str(tmp_path))
    texts = difficult()
    wanted = other(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    found = ours.encode_all(texts, 16)
    assert not [text for text, a, b in zip(texts, found, wanted, strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    make, vision, text = MODELS[name]
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    make(tmp_path / "first", vision, text)
    first = load_model(str(tmp_path / "first"))
    write(first.view("first"), tmp_path / "second")
    second = load_model(str(tmp_path / "second"))
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]
    assert (second.preprocess, second.joint_point) == (first.preprocess, first.joint_point)
    assert second.logit_scale == pytest.approx(first.logit_scale) and second.logit_bias == first.logit_bias
    assert first.text is not None and second.text is not None
    texts = difficult()
    assert torch.equal(second.text.encode(texts), first.text.encode(texts))


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_what_transformers_makes_of_their_export(name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    view = view_of(trained(*RUNS[name]), "run")
    write(view, tmp_path)
    other = load_back(tmp_path)
    size = view.preprocess.size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert view.text is not None and view.embed_image is not None
    with torch.inference_mode():
        image, text = view.embed_image(view.encoder(images)), view.text(view.text.encode(TEXTS))
    torch.testing.assert_close(other.image(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.text(TEXTS), text, atol=1e-5, rtol=0)
    assert other.scale == pytest.approx(view.logit_scale) and other.bias == pytest.approx(view.logit_bias)
    again = load_model(str(tmp_path))
    ours = vectors(again, images)
    torch.testing.assert_close(ours[0], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], text, atol=1e-5, rtol=0)
    assert again.found.left_over == () and again.preprocess == view.preprocess
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        text=TEXTS, images=[Image.new("RGB", (90, 70))], padding="max_length", truncation=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape[-2:] == (size, size) and inputs["input_ids"].shape[1] == view.text.context


def test_the_first_siglip_drops_punctuation_before_its_tokens(tmp_path: Path) -> None:
    siglip(tmp_path, {}, {})
    settings = tmp_path / "tokenizer_config.json"
    plain = load_model(str(tmp_path)).text
    # The class of that name runs sentencepiece in Python; the file tokenizer.json holds the same pieces.
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    cleaned = load_model(str(tmp_path)).text
    assert plain is not None and cleaned is not None
    assert torch.equal(cleaned.encode(["A Photo, of: (dogs)!"]), plain.encode(["a photo of dogs"]))
    assert not torch.equal(plain.encode(["A Photo, of: (dogs)!"]), plain.encode(["a photo of dogs"]))


@pytest.mark.parametrize(
    ("make", "text", "reason"),
    [
        # The library makes up a tokenizer of three tokens for a CLIP without one.
        (clip, {}, "do not belong together"),
        (clip, {"eos_token_id": 2}, "do not belong together"),
        (siglip, {}, r"give a folder with tokenizer\.json"),
    ],
)
def test_a_folder_without_a_tokenizer_gives_one_line(
    make: Any, text: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    make(tmp_path, {}, text)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=reason) as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_or_of_no_use_are_named(tmp_path: Path) -> None:
    clip(tmp_path, {}, {})
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"something.else": torch.zeros(2)}, file)
    assert load_model(str(tmp_path)).found.left_over == ("something.else",)
    del weights["text_projection.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"lack 1 tensors .*'text_projection.weight'"):
        load_model(str(tmp_path))
