"""The made-up source: every sample is a function of (seed, i), and shows what its fields say."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from altsight.core.dist import World
from altsight.core.rng import key
from altsight.core.types import Image, Text
from altsight.data.decode import decode
from altsight.data.loader import Loader
from altsight.data.shapes import COLOURS, SHAPES, SIDES, SIZES, TEMPLATES, Shapes, _cover
from altsight.data.sources import Pairs
from altsight.data.views import Crop
from altsight.methods.supervised import SupervisedPrepare

SOURCE = Shapes(400)


def test_a_sample_is_a_function_of_seed_and_place() -> None:
    again = pickle.loads(pickle.dumps(Shapes(10)))
    for i in range(10):
        assert again.document(i, key(5, 5)) == SOURCE.document(i, key(0, 0))
    assert Shapes(10, seed=1).image(3) != SOURCE.image(3)
    assert SOURCE.image(2) != SOURCE.image(3)


def test_a_document_is_a_pair_with_a_label() -> None:
    document = SOURCE.document(7, key(0, 0))
    image, text = document.parts
    assert isinstance(image, Image) and isinstance(text, Text)
    assert decode(image.data).shape == (3, 32, 32)
    assert text.value == SOURCE.all_captions(7)[0]
    assert SOURCE.classes[document.meta["label"]] == SOURCE.fields(7)["label"]
    assert decode(Shapes(1, pixels=48).image(0)).shape == (3, 48, 48)


def test_classes_are_sorted_and_all_combinations_occur() -> None:
    assert len(SOURCE.classes) == 20 and list(SOURCE.classes) == sorted(set(SOURCE.classes))
    fields = [SOURCE.fields(i) for i in range(len(SOURCE))]
    assert {f["label"] for f in fields} == set(SOURCE.classes)
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("side", SIDES)):
        counts = Counter(f[name] for f in fields)
        assert set(counts) == set(values)
        # Five standard deviations of a binomial.
        share = 1 / len(values)
        for count in counts.values():
            assert abs(count - 400 * share) < 5 * (400 * share * (1 - share)) ** 0.5
    assert all(f["label"] == f"{f['colour']} {f['shape']}" for f in fields)


def test_captions_name_all_that_there_is_and_use_every_template() -> None:
    used = Counter()
    for i in range(len(SOURCE)):
        (caption,) = SOURCE.texts(i)
        fields = SOURCE.fields(i)
        used[next(t for t in TEMPLATES if t.format(**fields) == caption)] += 1
    assert set(used) == set(TEMPLATES)


def test_pictures_show_what_the_fields_say() -> None:
    """The mean difference between pictures of one side, size or colour and those of the others lies where it should."""
    pictures = np.stack([decode(SOURCE.image(i)).numpy().astype(float) for i in range(len(SOURCE))])
    fields = [SOURCE.fields(i) for i in range(len(SOURCE))]
    left = np.array([f["side"] == "left" for f in fields])
    large = np.array([f["size"] == "large" for f in fields])
    # Where colours stand out from the grey background: on the object's side, and more of it where it is large.
    colourful = pictures.std(axis=1)
    halves = colourful[:, :, :16].mean(axis=(1, 2)) - colourful[:, :, 16:].mean(axis=(1, 2))
    assert halves[left].mean() > 3 > -3 > halves[~left].mean()
    assert abs(halves[left & large].mean()) > 1.5 * abs(halves[left & ~large].mean())
    for colour, paint in COLOURS.items():
        chosen = np.array([f["colour"] == colour for f in fields])
        tint = pictures[chosen].mean(axis=(0, 2, 3)) - pictures[~chosen].mean(axis=(0, 2, 3))
        others = np.mean([c for name, c in COLOURS.items() if name != colour], axis=0)
        assert tint @ (np.array(paint) - others) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_in_the_area_they_cover(shape: str) -> None:
    exact = {"circle": np.pi, "square": 4 * 0.81, "cross": 4 * (2 * 0.33 - 0.33**2), "triangle": 1.9 * 1.9 / 1.9}
    cover = _cover(shape, 200, np.array([0.5, 0.5]), 0.3)
    assert cover.sum() / (200 * 0.3) ** 2 == pytest.approx(exact[shape], rel=0.04)


def test_it_is_a_source_for_the_loader() -> None:
    small = Shapes(64)
    loader = Loader(small, small.order(0), SupervisedPrepare(Crop(flip=False), 24), 16)
    batches = [batch for batch, _ in loader.batches(World(), 0, 64)]
    assert sorted(int(i) for b in batches for i in b.samples) == list(range(64))
    assert batches[0]["image"].shape == (16, 3, 24, 24) and not any(b.bad for b in batches)
    assert small.parts() == {"shapes 0": 64} and small.cached(None) == small and not small.is_remote
    assert len(small.thinned(10)) == 10 and len(small.thinned(100)) == 64


def test_it_has_what_evaluations_ask_a_source_of_pairs_for() -> None:
    asked = {name for name in dir(Pairs) if not name.startswith("_")}
    own = {"index", "captions", "label", "images", "label_ids", "class_name"}
    assert asked - own <= set(dir(SOURCE))
