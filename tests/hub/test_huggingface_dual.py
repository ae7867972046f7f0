"""Dual encoders of transformers: read, written, and equal to the library's own on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from altsight.hub.load import load_model
from altsight.hub.model import Model
from tests.hub.test_openclip import scrambled
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
    import tokenizers
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


@pytest.mark.parametrize("make", [clip_tokenizer_folder, siglip_tokenizer_folder])
def test_tokens_are_the_librarys(make: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from altsight.hub.hf_tokenizer import hf_tokenizer

    make(tmp_path)
    other, ours = AutoTokenizer.from_pretrained(tmp_path), hf_tokenizer(str(tmp_path))
    texts = difficult()
    wanted = other(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    found = ours.encode_all(texts, 16)
    assert not [text for text, a, b in zip(texts, found, wanted, strict=True) if not torch.equal(a, b)]
