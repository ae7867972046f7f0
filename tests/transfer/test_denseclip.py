"""DenseCLIP: the invariants of its specification (7.1, 7.4, 7.6), and wrong use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.scenes import Scenes, write_ade20k
from altsight.evals.base import Preprocess, View
from altsight.evals.load import view_of
from altsight.methods.base import Corpus
from altsight.methods.clip import CLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextTower
from altsight.train.checkpoint import load_latest
from altsight.train.optim import parameter_groups
from altsight.transfer.base import FitConfig
from altsight.transfer.denseclip import OPTIM, DenseCLIP
from altsight.transfer.scoremaps import ScoreMaps, dense_features
from altsight.transfer.segmenter import Segmenter
from tests.toy import CONFIG, toy_clip

NAMES = ("red circle", "blue square", "green cross")


def settings(data: str = "", **changes: object) -> DenseCLIP:
    fit = FitConfig(epochs=3, batch=6, workers=0, precision="fp32", device="cpu")
    base = DenseCLIP(data, size=32, room=6, channels=16, drop_path=0.0, optim=replace(OPTIM, lr=1e-2), fit=fit)
    return replace(base, **changes)  # type: ignore[arg-type]


def built(**changes: object) -> tuple[Segmenter, ScoreMaps]:
    method = settings(**changes).build(toy_clip(), NAMES)
    assert isinstance(method.decoder, ScoreMaps)
    return method, method.decoder


def images(count: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def scores(method: Segmenter, decoder: ScoreMaps) -> torch.Tensor:
    return decoder.scores(method.encoder, method.encoder(method.encoder.normalize(images())))


def test_scores_are_cosines_of_projected_patches_and_prompts() -> None:
    method, decoder = built(prompting="none")
    method.eval()
    view = toy_clip()
    assert view.project is not None
    with torch.no_grad():
        found = scores(method, decoder)
        patches = view.project(view.encoder(view.encoder.normalize(images())).patches)
        vectors = decoder.prompts()
    for place in range(16):
        for label in range(len(NAMES)):
            want = F.cosine_similarity(patches[:, place], vectors[label][None], dim=1)
            torch.testing.assert_close(found[:, label, place // 4, place % 4], want, rtol=1e-4, atol=1e-5)


def test_the_prompt_is_start_contexts_name_end() -> None:
    _, decoder = built(prompting="none")
    tower = toy_clip().text
    assert tower is not None
    embed, positions = tower.token_embedding, tower.positional_embedding  # type: ignore[union-attr]
    name = "red circle"
    ids = tower.tokenizer.encode(name, 24)
    ids = ids[: int((ids == tower.tokenizer.end).int().argmax()) + 1]
    whole = torch.cat([embed(ids[:1]), decoder.prompts.contexts, embed(ids[1:])])  # type: ignore[operator]
    x = (whole + positions[: len(whole)])[None]  # type: ignore[index]
    for block in tower.blocks:  # type: ignore[union-attr]
        x = block(x, is_causal=True)  # type: ignore[operator]
    want = tower.text_projection(tower.ln_final(x[:, -1]))  # type: ignore[operator]
    # The end token lies eight places further than without contexts.
    torch.testing.assert_close(decoder.prompts()[:1], want, rtol=1e-4, atol=1e-5)


def test_a_prompt_without_contexts_is_the_towers_own_text() -> None:
    _, decoder = built(prompting="none", contexts=0)
    view = toy_clip()
    with torch.no_grad():
        got = F.normalize(decoder.prompts(), dim=-1)
    torch.testing.assert_close(got, view.encode_text(NAMES), rtol=1e-4, atol=1e-5)


def test_at_the_start_the_context_decoder_changes_next_to_nothing() -> None:
    with_it, decoder = built()
    without, plain = built(prompting="none")
    # The same weights everywhere else: everything is drawn by its own key.
    assert torch.equal(decoder.prompts.contexts, plain.prompts.contexts)
    with torch.no_grad():
        difference = (scores(with_it.eval(), decoder) - scores(without.eval(), plain)).abs().max()
        outputs = (with_it.logits(images()) - without.logits(images())).abs().max()
    assert 0 < difference < 1e-4, "gamma is 1e-4, not 0"
    assert outputs < 2e-6


def test_the_scores_join_the_map_of_their_stride() -> None:
    method, decoder = built()
    widths = [lateral.in_channels for lateral in decoder.fpn.laterals]  # type: ignore[union-attr]
    assert widths == [64, 64, 64 + len(NAMES), 64]
    assert decoder.maps.norms[0].num_groups == 1  # type: ignore[union-attr]
    method.train()
    logits = decoder(method.encoder, method.encoder(method.encoder.normalize(images())))
    assert logits["auxiliary"].shape == (2, 3, 4, 4)
    assert logits["auxiliary"].abs().max() > 1, "cosines over the temperature"
    assert set(decoder.eval()(method.encoder, method.encoder(method.encoder.normalize(images())))) == {"segmentation"}


def test_parameter_groups() -> None:
    method, _ = built()
    names = {id(p): name for name, p in method.named_parameters()}
    scales = {}
    for group in parameter_groups(method, OPTIM):
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
    assert not any(name.startswith("decoder.prompts.tower") for name in scales), "frozen, not at a rate of 0"
    assert {scale for name, scale in scales.items() if name.startswith("encoder.")} == {0.1}
    assert {scale for name, scale in scales.items() if "image_projection" in name} == {0.1}
    assert scales["decoder.prompts.contexts"] == scales["decoder.gamma"] == 1.0
    assert (OPTIM.power, OPTIM.weight_decay, OPTIM.min_lr) == (0.9, 1e-4, 1e-6)


def test_the_image_writes_the_prompts_in_the_pre_model() -> None:
    _, decoder = built(prompting="pre")
    decoder.eval()
    tokens = torch.randn(2, 17, 64)
    vectors = decoder.classes(tokens)
    assert vectors.shape == (2, 3, 64) and not torch.allclose(vectors[0], vectors[1])
    written = decoder.context(decoder.prompts.contexts.expand(2, -1, -1), tokens)
    for image in range(2):
        decoder.prompts.contexts.data = written[image].detach()
        torch.testing.assert_close(decoder.prompts(), vectors[image], rtol=1e-4, atol=1e-5)
    assert not hasattr(decoder, "gamma")


@pytest.mark.parametrize("prompting", ["post", "pre"])
def test_every_trained_parameter_has_a_gradient(prompting: str) -> None:
    method, _ = built(prompting=prompting)
    method.train()
    mask = torch.randint(0, 3, (2, 32, 32)).to(torch.uint8)
    given = Batch({"image": images(), "mask": mask}, torch.arange(2), torch.arange(2))
    losses = method.embed(given, key(0, 0)).local
    sum(losses.values()).backward()  # type: ignore[union-attr]
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad is None for p in method.decoder.prompts.tower.parameters())  # type: ignore[union-attr]


def test_training_moves_gamma_and_contexts_and_never_the_text_tower(tmp_path: Path) -> None:
    write_ade20k(tmp_path / "made", Scenes(12, pixels=40), Scenes(4, seed=1, pixels=40))
    transfer = settings(str(tmp_path / "made"), room=12)
    start = transfer.build(toy_clip(), Scenes(1).names).state_dict()
    found = transfer(toy_clip(), tmp_path / "out")
    assert [result.metric for result in found] == ["miou", "pixel_accuracy"]
    saved = load_latest(tmp_path / "out/checkpoints", print)
    assert saved is not None
    text = [name for name in start if name.startswith("decoder.prompts.tower.")]
    assert text and all(torch.equal(start[name], saved["method"][name]) for name in text)
    assert not torch.equal(start["decoder.prompts.contexts"], saved["method"]["decoder.prompts.contexts"])
    assert (saved["method"]["decoder.gamma"] - 1e-4).abs().max() > 1e-4
    assert transfer(toy_clip(), tmp_path / "out") == found


def clips_resnet() -> View:
    """Return a view as that of OpenAI's RN50, with the toy's text tower."""
    toy = toy_clip()
    assert isinstance(toy.text, TextTower)
    clip = CLIP(CONFIG, Encoder(EncoderConfig("resnet50_clip", img_size=64)), Corpus(toy.text.tokenizer))
    clip.init_weights(key(0, 0, "init"))
    clip.feature_point = "pooled"  # type: ignore[misc]
    return replace(view_of(clip.eval(), "RN50"), project=None)


def test_clips_resnet_asks_its_attention_pool_from_every_place() -> None:
    view = clips_resnet()
    assert view.embed_image is not None
    pool = view.encoder.backbone.head
    with torch.no_grad():
        encoded = view.encoder(view.encoder.normalize(torch.rand(2, 3, 64, 64)))
        found = dense_features(view.encoder, encoded, "pooled")
        maps = encoded.layers[-1]
        tokens = maps.flatten(2).mT
        positions = resample_abs_pos_embed(pool.pos_embed[None], [2, 2], list(pool.feat_size), 1)
        x = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + positions
        q, k, v = (
            part.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for part in (pool.q(x), pool.k(x), pool.v(x))
        )
        want = ((q @ k.mT / pool.head_dim**0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found, want[:, 1:], rtol=1e-4, atol=1e-5)
        # The place that the pool asks from otherwise is the mean.
        torch.testing.assert_close(view.encoder.point(encoded, "pooled"), want[:, 0], rtol=1e-4, atol=1e-5)


def test_scores_of_clips_resnet_join_its_last_stage() -> None:
    method = settings(size=64).build(clips_resnet(), NAMES)
    decoder = method.decoder
    assert isinstance(decoder, ScoreMaps)
    widths = [lateral.in_channels for lateral in decoder.fpn.laterals]  # type: ignore[union-attr]
    assert widths == [256, 512, 1024, 2048 + len(NAMES)]
    with torch.no_grad():
        logits = method.eval().logits(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert logits.shape == (1, 3, 64, 64) and logits.isfinite().all()


def no_text(view: View) -> View:
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2))
    return View("mae", encoder, Preprocess(32))


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (no_text, {}, "'mae' has no text tower"),
        (lambda view: replace(view, project=None), {}, "maps whole images to the joint space and no single places"),
        (lambda view: replace(view, feature_point="pooled"), {}, "no single places"),
        (lambda view: view, {"room": 3}, r"the class name 'banana' takes \d+ tokens .* room for 3: set --room"),
        (lambda view: view, {"room": 12, "contexts": 20}, "more than the 24 that the text tower reads"),
        (lambda view: view, {"temperature": 0.0}, "mend --temperature"),
        (lambda view: view, {"contexts": -1}, "--contexts"),
        (lambda view: view, {"size": 36}, "36 is not divisible by the patch size 8"),
        (lambda view: view, {"fit": FitConfig(1, 6, micro_batch=3)}, "a batch cannot be split"),
    ],
    ids=[
        "no text",
        "no projection",
        "pooled",
        "long name",
        "long prompt",
        "temperature",
        "contexts",
        "size",
        "micro-batch",
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, change: object, changes: dict[str, object], message: str) -> None:
    write_ade20k(tmp_path / "made", Scenes(6, pixels=32), Scenes(2, seed=1, pixels=32))
    assert callable(change)
    with pytest.raises(UserError, match=message) as error:
        settings(str(tmp_path / "made"), **changes)(change(toy_clip()), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
