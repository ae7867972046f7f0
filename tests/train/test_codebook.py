"""`make_codebook`: the same words from the same data and seed, words that fit the data, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.prepared import Prepared
from altsight.methods.base import Corpus
from altsight.methods.beit import BEiT
from altsight.nn.codebook import load_codebook, random_projection, save_codebook
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.tokens import TokenizerConfig
from altsight.train.codebook import CodebookConfig, make_codebook

CONFIG = CodebookConfig(vocabulary=64, patch_size=8, samples=128, img_size=32, workers=0)


@pytest.mark.parametrize("kind", ["kmeans", "patches"])
def test_codebook_of_a_data_set(kind: str, sample_data: Prepared, tmp_path: Path) -> None:
    config = CodebookConfig(**{**vars(CONFIG), "kind": kind})
    seen: list[tuple[str, int, int]] = []
    found = make_codebook(
        sample_data, tmp_path / "new" / "words.safetensors", config, lambda *progress: seen.append(progress)
    )
    words = load_codebook(tmp_path / "new" / "words.safetensors")
    assert words.shape == (64, 192)
    assert seen[-1][1] == seen[-1][2] == (128 if kind == "kmeans" else 64)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert 0 < found["top_word"] < 0.5 and 3 < found["word_bits"] <= 6
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["words.safetensors"]
    make_codebook(sample_data, tmp_path / "again.safetensors", config)
    assert torch.equal(load_codebook(tmp_path / "again.safetensors"), words)
    make_codebook(sample_data, tmp_path / "other.safetensors", CodebookConfig(**{**vars(config), "seed": 1}))
    assert not torch.equal(load_codebook(tmp_path / "other.safetensors"), words)


def test_patches_share_out_better_among_words_of_the_data_than_of_noise(sample_data: Prepared, tmp_path: Path) -> None:
    path, noise = tmp_path / "words.safetensors", tmp_path / "noise.safetensors"
    make_codebook(sample_data, path, CONFIG)
    save_codebook(random_projection(64, 8, key(0, 0)), noise)
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", 32, 8, width=32, depth=1, heads=2))
    top = {}
    for name in (path, noise):
        method = BEiT(BEiT.Config(TokenizerConfig(str(name), 64)), encoder, Corpus())
        method.init_weights(key(0, 0, "init"))
        method.prepare(CONFIG.crop, 32)
        image = torch.stack([_image(sample_data, i) for i in range(100)])
        top[name] = float(torch.bincount(method.tokenizer(image).flatten()).max() / image.shape[0] / 16)
    assert top[path] < top[noise]


def _image(data: Prepared, i: int) -> torch.Tensor:
    at = key(9, i)
    return CONFIG.crop(data.source.document(i, at).images[0], 32, at).float() / 255


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"vocabulary": 4000, "samples": 10}, "cannot make 4,000 words"),
        ({"vocabulary": 1}, "1 words of 8 x 8 pixels cannot be made"),
        ({"patch_size": 64}, "64 words of 64 x 64 pixels cannot be made of images of 32 x 32"),
    ],
)
def test_what_cannot_be_done(changed: dict[str, int], told: str, sample_data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        make_codebook(sample_data, tmp_path / "words.safetensors", CodebookConfig(**{**vars(CONFIG), **changed}))
    assert not list(tmp_path.iterdir())


def test_names_and_places(sample_data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a codebook is a .safetensors file"):
        make_codebook(sample_data, tmp_path / "words.pt", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_codebook(sample_data, tmp_path / "file" / "words.safetensors", CONFIG)
