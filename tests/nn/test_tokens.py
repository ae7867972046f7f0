"""Visual words: cosines against loops, codebooks of noise, of patches and of k-means, files, and external networks."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.views import normalize, to_unit
from altsight.nn import codebook as codebooks
from altsight.nn.codebook import load_codebook, nearest, random_projection, save_codebook, train_codebook, usage
from altsight.nn.tokens import PatchTokenizer, TokenizerConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 4


def pictures(count: int, size: int = 12, seed: int = 0) -> Tensor:
    """Return uint8 pictures of coarse noise, in which patches have colours of their own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, size // 2, size // 2), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


def make(config: TokenizerConfig, patch: int = PATCH, seed: int = 0) -> PatchTokenizer:
    tokenizer = PatchTokenizer(config, patch)
    tokenizer.init_weights(key(seed, 0, "tokenizer"))
    return tokenizer


def vector(image: Tensor, top: int, left: int) -> list[float]:
    """Return the normalised pixels of a patch, channel by channel."""
    return [
        (int(image[c, top + y, left + x]) / 255 - MEAN[c]) / STD[c]
        for c in range(3)
        for y in range(PATCH)
        for x in range(PATCH)
    ]


def slow_tokens(image: Tensor, words: Tensor) -> list[int]:
    """Return the word of highest cosine for every patch, patch by patch and word by word."""
    found = []
    for top in range(0, image.shape[1], PATCH):
        for left in range(0, image.shape[2], PATCH):
            patch, best = vector(image, top, left), (-2.0, -1)
            length = math.sqrt(sum(p * p for p in patch))
            for number, word in enumerate(words.tolist()):
                dot = sum(p * w for p, w in zip(patch, word, strict=True))
                best = max(best, (dot / length / math.sqrt(sum(w * w for w in word)), number))
            found.append(best[1])
    return found


def test_tokens_equal_reference() -> None:
    tokenizer, images = make(TokenizerConfig(vocabulary=50)), pictures(3)
    tokens = tokenizer(images.float() / 255)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [slow_tokens(image, tokenizer.words) for image in images]
    assert len(tokens.unique()) > 5


def test_tokens_do_not_depend_on_what_is_computed_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, images = make(TokenizerConfig(vocabulary=300)), pictures(8, size=32).float() / 255
    tokens = tokenizer(images)
    assert torch.equal(tokens, torch.cat([tokenizer(images[:3]), tokenizer(images[3:])]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokens, tokenizer(images))
    monkeypatch.setattr(codebooks, "CHUNK", 7)
    assert torch.equal(tokens, tokenizer(images))


def test_random_projection_is_uniform_noise_of_the_seed() -> None:
    words = random_projection(400, PATCH, key(0, 0))
    torch.testing.assert_close(words.norm(dim=1), torch.ones(400))
    scaled = words / words.std()
    assert scaled.pow(4).mean().item() == pytest.approx(1.8, abs=0.05), "kurtosis: 1.8 if uniform, 3 if normal"
    assert abs(scaled.mean()) < 0.02
    assert torch.equal(words, random_projection(400, PATCH, key(0, 0)))
    assert not torch.equal(words, random_projection(400, PATCH, key(1, 0)))


def test_all_of_a_random_codebook_is_used() -> None:
    tokens = make(TokenizerConfig(vocabulary=64))(pictures(200).float() / 255)
    share, bits = usage(tokens, 64).tolist()
    assert len(tokens.unique()) > 55 and share < 0.12 and bits > 5


def test_words_without_a_mean_do_not_see_brightness() -> None:
    images = normalize(pictures(8), "imagenet") * 0.5
    brighter = images + 2.0
    plain, without = make(TokenizerConfig(vocabulary=100)), make(TokenizerConfig(vocabulary=100, zero_mean=True))
    assert without.words.mean(dim=1).abs().max() < 1e-6
    for tokenizer, changed in ((plain, True), (without, False)):
        before, after = (tokenizer(to_unit(x, "imagenet")) for x in (images, brighter))
        assert (before == after).float().mean().item() < 0.7 if changed else torch.equal(before, after)


def test_k_means_finds_what_patches_are_made_of() -> None:
    """Pictures put together from five textures and a little noise: five words, one for each."""
    generator = torch.Generator().manual_seed(0)
    textures = torch.randint(0, 256, (5, 3, PATCH, PATCH), generator=generator).float()
    chosen = torch.randint(0, 5, (300, 4), generator=generator)
    grid = textures[chosen].view(300, 2, 2, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(300, 3, 8, 8)
    images = (grid + 4 * torch.randn(grid.shape, generator=generator)).clamp(0, 255).byte()
    best = 0.0
    for seed in range(4):  # k-means may put two centres into one texture
        words = train_codebook(iter(images), 5, PATCH, key(seed, 0), "kmeans")
        torch.testing.assert_close(words.norm(dim=1), torch.ones(5))
        tokens = nearest(codebooks.cut(images, PATCH).flatten(0, 1), words)
        pure = sum(int(torch.bincount(tokens[chosen.flatten() == t], minlength=5).max()) for t in range(5)) / 1200
        best = max(best, pure * len(tokens.unique()) / 5)
    assert best > 0.99
    assert torch.equal(words, train_codebook(iter(images), 5, PATCH, key(seed, 0), "kmeans"))


def test_words_of_patches_are_patches_of_different_images() -> None:
    images = pictures(6)
    own = [
        torch.nn.functional.normalize(torch.tensor([vector(image, 4 * y, 4 * x) for y in range(3) for x in range(3)]))
        for image in images
    ]

    def origins(words: Tensor) -> list[int]:
        return [next(i for i, p in enumerate(own) if (p - word).norm(dim=1).min() < 1e-4) for word in words]

    assert origins(train_codebook(iter(images), 6, PATCH, key(0, 0), "patches")) == [0, 1, 2, 3, 4, 5]
    assert origins(train_codebook(iter(images), 4, PATCH, key(0, 0), "patches")) == [0, 1, 2, 3]
    assert origins(train_codebook(iter(images), 8, PATCH, key(0, 0), "patches")) == [0, 1, 2, 3, 4, 5, 0, 1]
    twice = train_codebook(iter(images), 54, PATCH, key(0, 0), "patches")
    assert len({tuple(round(v, 4) for v in word) for word in twice.tolist()}) == 54, "no patch is taken twice"


@pytest.mark.parametrize("kind", ["patches", "kmeans"])
@pytest.mark.parametrize("images", [0, 2])
def test_too_few_patches(kind: codebooks.Kind, images: int) -> None:
    with pytest.raises(UserError, match=f"{9 * images} patches cannot make 20 words"):
        train_codebook(iter(pictures(images)), 20, PATCH, key(0, 0), kind)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    words = random_projection(30, PATCH, key(5, 0))
    save_codebook(words, path)
    torch.testing.assert_close(load_codebook(path), words, rtol=0, atol=1e-7)
    tokenizer = make(TokenizerConfig(str(path), vocabulary=30))
    tokenizer.check(12)
    images = pictures(2)
    assert tokenizer(images.float() / 255).tolist() == [slow_tokens(image, words) for image in images]


def test_file_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    save_codebook(random_projection(30, PATCH, key(5, 0)), path)
    told = "has 30 words of 4 x 4 pixels, but the run has a vocabulary of {} and patches of {} x {}"
    with pytest.raises(UserError, match=told.format(40, 4, 4)):
        make(TokenizerConfig(str(path), vocabulary=40))
    with pytest.raises(UserError, match=told.format(30, 8, 8)):
        make(TokenizerConfig(str(path), vocabulary=30), patch=8)


def test_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        make(TokenizerConfig(str(path), vocabulary=30))
    save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is no codebook"):
        make(TokenizerConfig(str(path), vocabulary=30))
    (tmp_path / "net.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="neither a codebook"):
        make(TokenizerConfig(str(tmp_path / "net.pt"), vocabulary=30))


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt"])
def test_a_missing_file_is_missed_by_training_alone(name: str, tmp_path: Path) -> None:
    tokenizer = make(TokenizerConfig(str(tmp_path / name), vocabulary=30))
    with pytest.raises(UserError, match=f"{name}' of --method.tokenizer.path does not exist"):
        tokenizer.check(12)


def test_a_run_keeps_the_codebook_that_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    save_codebook(random_projection(30, PATCH, key(5, 0)), path)
    began = make(TokenizerConfig(str(path), vocabulary=30))
    path.unlink()
    again = make(TokenizerConfig(str(path), vocabulary=30))
    again.load_state_dict(began.state_dict())
    again.check(12)
    images = pictures(2).float() / 255
    assert torch.equal(again(images), began(images))


class Brightness(nn.Module):
    """Token: the mean of 8 x 8 pixels in tenths, or logits that say so."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.logits = logits
        self.pool = nn.AvgPool2d(8)

    def forward(self, x: Tensor) -> Tensor:
        tenths = (self.pool(x).mean(1) * 10).long()
        if self.logits:
            return torch.nn.functional.one_hot(tenths, 10).permute(0, 3, 1, 2).float()
        return tenths


def network(path: Path, logits: bool) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Brightness(logits)).save(str(path))
    return str(path)


@pytest.mark.parametrize("logits", [True, False])
def test_network(tmp_path: Path, logits: bool) -> None:
    """It is given the crop with 8 pixels for a patch, and its range pulled in to [0.1, 0.9]."""
    tokenizer = make(TokenizerConfig(network(tmp_path / "net.pt", logits), vocabulary=10), patch=16)
    tokenizer.check(64)
    levels = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = levels.repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)
    # Half of the resolution: within a patch the antialiased copy strays by its rims only.
    expected = ((0.8 * levels + 0.1) * 10).flatten(1)
    found = tokenizer(images)
    sure = (expected % 1 - 0.5).abs() < 0.35
    assert sure.sum() > 15 and torch.equal(found[sure], expected.long()[sure])
    assert tokenizer(torch.full((1, 3, 64, 64), 0.05)).unique().tolist() == [1]
    assert tokenizer(torch.full((1, 3, 64, 64), 0.95)).unique().tolist() == [8]
    assert not tokenizer.state_dict() and not list(tokenizer.parameters())
    assert torch.equal(copy.deepcopy(tokenizer)(images), found)


def test_network_that_does_not_fit(tmp_path: Path) -> None:
    path = network(tmp_path / "logits.pt", True)
    with pytest.raises(UserError, match=r"4 x 4 tokens out of 10 words from 32 x 32 pixels.* 4 x 4 out of 11"):
        make(TokenizerConfig(path, vocabulary=11), patch=16).check(64)
    ids = make(TokenizerConfig(network(tmp_path / "ids.pt", False), vocabulary=8), patch=16)
    with pytest.raises(UserError, match="4 x 4 out of 8: set"):
        ids(torch.ones(1, 3, 64, 64))


def test_usage() -> None:
    share, bits = usage(torch.tensor([[0, 0], [1, 3]]), 5).tolist()
    assert share == 0.5 and bits == pytest.approx(1.5)
    assert usage(torch.zeros(0, dtype=torch.int64), 5).tolist() == [0, 0]


def test_to_unit_undoes_normalisation() -> None:
    images = pictures(2)
    for name in ("imagenet", "clip", "half"):
        torch.testing.assert_close(to_unit(normalize(images, name), name), images.float() / 255)


def test_a_vocabulary_of_one() -> None:
    with pytest.raises(UserError, match="vocabulary of 1 leaves nothing to predict"):
        PatchTokenizer(TokenizerConfig(vocabulary=1), PATCH)
