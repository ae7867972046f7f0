"""Composite: a single part is the part itself, several are the weighted sum, and what they share is encoded once.

The slow references are the parts themselves, trained alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from altsight.commands.pretrain import pretrain
from altsight.core.config import OptimConfig, from_dict, to_dict
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch, Document, Example, Progress
from altsight.data import views
from altsight.data.shapes import Shapes
from altsight.data.staged import PatchDropout
from altsight.data.views import Crop
from altsight.methods import find
from altsight.methods.base import Corpus, Method
from altsight.methods.composite import Composite, Part
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.optim import parameter_groups
from altsight.train.run import Run, load_run, override, save_run

AT = key(0, 0, "init")
SMALL = {"width": 32, "heads": 2, "depth": 1}
TEXT = {"text": {"width": 32, "heads": 2, "layers": 1, "context": 16}, "embed_dim": 16}
PIXELS = {"decoder": SMALL}
CAPTIONS = {"captions": {"unimodal_layers": 1, "multimodal_layers": 1, "heads": 2, "head_dim": 8, "length": 16}}
SETTINGS: dict[str, dict[str, Any]] = {
    "mae": PIXELS,
    "mug": PIXELS | CAPTIONS,
    "clip": TEXT,
    "flip": TEXT | {"mask_ratio": 0.75},
    "supervised": {},
    "simclr": {"out_dim": 16},
    "mocov3": {"hidden": 32, "out_dim": 16},
}


@pytest.fixture
def config() -> EncoderConfig:
    return EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2)


def part(name: str, weight: float = 1.0, **settings: Any) -> Part:
    return Part(name, weight, SETTINGS[name] | settings)


@pytest.fixture
def corpus(corpus: Corpus) -> Corpus:
    return dataclasses.replace(corpus, classes=Shapes(1).classes)


@pytest.fixture
def alone(config: EncoderConfig, corpus: Corpus) -> Callable[..., Method]:
    """Build a part as a method of its own."""

    def make(name: str) -> Method:
        cls = find(name)
        kind: Any = cls.Config
        data = to_dict(kind())
        for field, value in SETTINGS[name].items():
            data[field] = data[field] | value if isinstance(value, dict) else value
        method = cls(from_dict(data, kind, "test"), Encoder(config), corpus)  # type: ignore[call-arg]
        method.init_weights(AT)
        return method

    return make


@pytest.fixture
def composite(config: EncoderConfig, corpus: Corpus) -> Callable[..., Composite]:
    def make(*parts: Part) -> Composite:
        method = Composite(Composite.Config(parts), Encoder(config), corpus)
        method.init_weights(AT)
        return method

    return make


def batch_of(method: Method, size: int = 6) -> Batch:
    source, prepare = Shapes(size, seed=5), method.prepare(Crop(), 32)
    examples = [prepare(source.document(i, key(0, i)), key(0, i)) for i in range(size)]
    made: list[Example] = [example for example in examples if example is not None]
    assert len(made) == size
    tensors = {name: torch.stack([e[name] for e in made]) for name in made[0]}
    return Batch(tensors, torch.arange(size), torch.arange(size))


def trained(method: Method, micro: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (losses, gradients by name) of one global batch."""
    method.train()
    method.start_step(Progress(3, 10))
    losses, _ = Accumulator(method, Embed(method), 0, micro)(batch_of(method))
    return losses, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def inside(name: str, part_name: str) -> str:
    """Return what a parameter of a method alone is called in a composite."""
    return name if name.startswith("encoder.") else f"parts.{part_name}.{name}"


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("micro", [0, 2])
def test_one_part_is_the_part_itself(
    name: str, micro: int, alone: Callable[..., Method], composite: Callable[..., Composite]
) -> None:
    whole, single = composite(part(name)), alone(name)
    weights = {inside(n, name): v for n, v in single.state_dict().items()}
    assert whole.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[n]) for n, v in whole.state_dict().items())
    theirs = batch_of(single)
    assert batch_of(whole).tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(v, theirs[n]) for n, v in batch_of(whole).tensors.items())
    losses, grads = trained(whole, micro)
    slow_losses, slow_grads = trained(single, micro)
    assert {n: v.item() for n, v in losses.items()} == {f"{name}/{n}": v.item() for n, v in slow_losses.items()}
    assert grads.keys() == {inside(n, name) for n in slow_grads}
    assert all(torch.equal(grads[inside(n, name)], g) for n, g in slow_grads.items())
    for trained_one in (whole, single):
        trained_one.after_step(Progress(3, 10))
    assert whole.report() == {f"{name}/{n}": v for n, v in single.report().items()}


@pytest.mark.parametrize("names", [("mug", "clip"), ("mae", "supervised"), ("flip", "mug"), ("simclr", "clip")])
@pytest.mark.parametrize("micro", [0, 3])
def test_several_parts_are_their_weighted_sum(
    names: tuple[str, str], micro: int, alone: Callable[..., Method], composite: Callable[..., Composite]
) -> None:
    a, b = names
    losses, grads = trained(composite(part(a, 0.5), part(b, 3.0)), micro)
    expected: dict[str, Tensor] = {}
    for name, weight in ((a, 0.5), (b, 3.0)):
        slow_losses, slow_grads = trained(alone(name), micro)
        for loss, value in slow_losses.items():
            assert losses[f"{name}/{loss}"].item() == pytest.approx(value.item(), rel=1e-5)
        for parameter, grad in slow_grads.items():
            place = inside(parameter, name)
            expected[place] = expected.get(place, torch.zeros(())) + weight * grad
    assert grads.keys() == expected.keys()
    for place, grad in expected.items():
        assert (grads[place] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, place


def test_weights_multiply_those_of_the_parts(composite: Callable[..., Composite]) -> None:
    whole = composite(part("mug", 2.0, caption_weight=0.3), part("clip", 0.25))
    trained(whole)
    assert whole.weights() == pytest.approx({"mug/pixels": 2.0, "mug/caption": 0.6, "clip/contrastive": 0.25})


def forwards(method: Composite) -> tuple[int, int]:
    """Return how often the encoder ran, and normalised, in one `embed`."""
    counts = {"forward": 0, "_normalize": 0}
    encoder: Any = method.encoder
    for name in counts:
        real = getattr(encoder, name)

        def counted(*args: Any, name: str = name, real: Any = real, **named: Any) -> Any:
            counts[name] += 1
            return real(*args, **named)

        # With the signature of `real`, which `Once` looks at.
        setattr(encoder, name, functools.wraps(real)(counted))
    method.embed(batch_of(method), key(0, 0))
    return counts["forward"], counts["_normalize"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((part("mug"), part("flip")), (1, 1)),  # the same image and the same visible patches
        ((part("mug"), part("flip", mask_ratio=0.5)), (2, 1)),
        ((part("mug"), part("clip")), (2, 1)),  # visible patches, and all of them
        ((part("clip"), part("supervised")), (1, 1)),
        ((part("mae"), part("mug"), part("clip"), part("supervised")), (2, 1)),
        ((part("clip"), part("simclr")), (3, 2)),  # the views are SimCLR's own
    ],
)
def test_the_encoder_runs_once_for_what_parts_share(
    parts: tuple[Part, ...], expected: tuple[int, int], composite: Callable[..., Composite]
) -> None:
    assert forwards(composite(*parts)) == expected


def test_what_parts_agree_on_is_stored_once(composite: Callable[..., Composite]) -> None:
    fields = batch_of(composite(part("mug"), part("flip"), part("clip"))).tensors
    assert fields.keys() == {"image", "mug+flip/keep", "mug/text", "flip/text", "clip/text"}
    fields = batch_of(composite(part("clip"), part("simclr"))).tensors
    assert fields.keys() == {"clip/image", "clip/text", "simclr/image", "simclr/colour"}


def test_preparations_are_pickled_and_refuse_what_a_part_cannot_use(
    composite: Callable[..., Composite], document: Callable[..., Document]
) -> None:
    prepare = pickle.loads(pickle.dumps(composite(part("mae"), part("supervised")).prepare(Crop(), 32)))
    assert prepare(document(label=None), key(0, 0)) is None
    example = prepare(document(), key(0, 0))
    assert example is not None and example.keys() == {"image", "mae/keep", "supervised/label"}


def test_an_image_is_decoded_once_for_all_parts(
    composite: Callable[..., Composite], document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = views.open_picture
    monkeypatch.setattr(views, "open_picture", lambda data: opened.append(data) or real(data))
    prepare = composite(part("mug"), part("clip"), part("flip")).prepare(Crop(), 32)
    opened.clear()
    prepare(document(), key(0, 0))
    assert len(opened) == 1
    Crop()(document().images[0], 32, key(0, 0))
    Crop()(document().images[0], 32, key(0, 0))
    assert len(opened) == 3, "nothing is remembered outside of a composite"


def test_parts_that_come_to_disagree_are_noticed(composite: Callable[..., Composite]) -> None:
    prepare = composite(part("mug"), part("flip")).prepare(Crop(), 32)
    other = dataclasses.replace(prepare.prepares[1], mask_ratio=0.5)
    wrong = dataclasses.replace(prepare, prepares=(prepare.prepares[0], other))
    with pytest.raises(AssertionError, match="agreed"):
        wrong(Shapes(1).document(0, AT), AT)


def test_flags_are_those_of_the_parts(composite: Callable[..., Composite]) -> None:
    def flags(*names: str) -> tuple[bool, bool, bool, int]:
        method = composite(*map(part, names))
        return method.masked, method.shares, method.drops_patches, method.least_batch

    assert flags("mug", "clip") == (True, True, False, 2)
    assert flags("mae") == (True, False, False, 1)
    assert flags("clip", "supervised") == (False, True, True, 2)
    assert Composite.masked is False and Composite.shares is False


def test_patch_dropout_is_for_all_parts(composite: Callable[..., Composite]) -> None:
    method = composite(part("clip"), part("supervised"))
    prepare = PatchDropout(method.prepare(Crop(), 32), 16, 0.5)
    example = prepare(Shapes(1).document(0, AT), AT)
    assert example is not None
    seen: list[Tensor] = []
    real = method.encoder.backbone.blocks[0].forward
    method.encoder.backbone.blocks[0].forward = lambda x, **rest: seen.append(x) or real(x, **rest)
    tensors = {name: torch.stack([value] * 2) for name, value in example.items()}
    method.embed(Batch(tensors, torch.arange(2), torch.arange(2)), AT)
    assert [x.shape[1] for x in seen] == [8 + 1]


def test_every_parameter_is_there_once_and_a_copy_shares_its_own_encoder(composite: Callable[..., Composite]) -> None:
    method = composite(part("mug"), part("clip"), part("mocov3"))
    names = [name for name, _ in method.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) and len({id(p) for p in method.parameters()}) == len(names)
    twin = copy.deepcopy(method)
    for _, made in twin._each():
        assert made.encoder is twin.encoder is not method.encoder
    assert twin.text is twin.parts["clip"].text and method.text is method.parts["clip"].text


def test_decay_and_rates_are_those_of_the_parts(composite: Callable[..., Composite], alone: Any) -> None:
    config = OptimConfig(lr=1.0, lr_base_batch=0, weight_decay=0.1)

    def decaying(method: Method) -> set[int]:
        return {id(p) for g in parameter_groups(method, config) if g["weight_decay"] for p in g["params"]}

    whole = composite(part("mug"), part("clip"))
    decays = {n for n, p in whole.named_parameters() if id(p) in decaying(whole)}
    for name in ("mug", "clip"):
        single = alone(name)
        own = {inside(n, name) for n, p in single.named_parameters() if id(p) in decaying(single)}
        listed = {inside(n, name) for n, _ in single.named_parameters()}
        # What CLIP exempts of the encoder is exempt, though MUG would let it decay.
        assert decays & listed == own - {"encoder.backbone.cls_token"}


def test_texts_and_the_joint_space_are_those_of_the_dual_part(
    composite: Callable[..., Composite], alone: Callable[..., Method]
) -> None:
    whole, clip = composite(part("mug"), part("clip")), alone("clip")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(whole.embed_image(whole.encoder(images)), clip.embed_image(clip.encoder(images)))
    none = composite(part("mae"))
    assert none.text is None
    encoded = none.encoder(images)
    assert torch.equal(none.embed_image(encoded), none.encoder.point(encoded, "mean"))
    assert composite(part("mocov3"), part("clip")).evaluated is not None


def test_impossible_parts_are_refused(corpus: Corpus, config: EncoderConfig) -> None:
    def refuse(match: str, *parts: Part, model: EncoderConfig = config) -> None:
        with pytest.raises(UserError, match=match):
            Composite(Composite.Config(parts), Encoder(model), corpus)

    refuse("no methods")
    refuse("names a method twice", part("mae"), part("mae"))
    refuse("cannot be part of a composite", Part("composite"))
    refuse("no method 'clup'", Part("clup"))
    refuse(r"method\.parts\.mae\.settings", part("mae", mask_rate=0.5))
    refuse("masks patches", part("clip"), part("mae"), model=EncoderConfig("test_resnet", img_size=32))
    with pytest.raises(UserError, match="learns from labels"):
        Composite(Composite.Config((part("mae"), part("supervised"))), Encoder(config), Corpus())


def test_a_run_of_a_composite_is_saved_and_loaded(tmp_path: Any) -> None:
    run: Run[Any] = Run("composite", Composite.Config((part("mug"), part("clip", 0.5))), Composite.optim)
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json") == run
    assert override(run, {"train.samples": 10}).method == run.method


def test_parts_are_set_in_a_plan_s_table_and_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = {"parts": [{"name": "mae"}, {"name": "clip", "weight": 2, "settings": {"text": {"layers": 3}}}]}
    config = from_dict(table, Composite.Config, "plan")
    assert config.parts == (Part("mae"), Part("clip", 2.0, {"text": {"layers": 3}}))
    with pytest.raises(SystemExit) as stop:
        pretrain(["composite", "--help"])
    assert stop.value.code == 0 and "--method.parts.1.weight" in capsys.readouterr().out
