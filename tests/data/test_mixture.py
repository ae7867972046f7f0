"""Several sources in one run: the order is exact, labels are renumbered, the folder opens again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.mix import MixConfig, mix
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared
from tests.data.conftest import Picture, WriteShards


@pytest.fixture
def parts(tmp_path: Path, write_shards: WriteShards, picture: Picture) -> list[Path]:
    """Pairs with the classes ant, cat and dog; a folder of images with the classes bee and cat; documents."""
    write_shards(tmp_path / "shards", 10, 4)
    for i in range(6):
        path = tmp_path / "tree" / ("bee", "cat")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(100 + i))
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "images" / "0.png").write_bytes(picture(200))
    document = {"text_list": ["before", "after"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]}
    (tmp_path / "docs" / "d.jsonl").write_text(json.dumps(document) + "\n")
    settings = {"shards": {"label": "class"}, "tree": {}, "docs": {}}
    for name, more in settings.items():
        prepare(PrepareConfig(str(tmp_path / name), tmp_path / f"{name}.p", vocab_size=300, **more))  # type: ignore[arg-type]
    return [tmp_path / f"{name}.p" for name in settings]


def mixed(parts: list[Path], out: Path, *weights: float) -> Prepared:
    return mix(MixConfig(tuple(parts), out, weights, vocab_size=300))


def test_a_mixture_serves_all_its_sources(parts: list[Path], tmp_path: Path) -> None:
    found = mixed(parts, tmp_path / "mixed", 2, 1, 1)
    source = found.source
    assert isinstance(source, Mixture)
    assert (len(source), found.classes) == (17, ("ant", "bee", "cat", "dog"))
    assert found.statistics["samples"] == 17
    alone = [open_prepared(part).source for part in parts]
    for i, (part, inner) in {0: (0, 0), 9: (0, 9), 10: (1, 0), 15: (1, 5), 16: (2, 0)}.items():
        mine, other = source.document(i, key(0, i)), alone[part].document(inner, key(0, i))
        assert mine.parts == other.parts
        assert source.name(i) == alone[part].name(inner)
        if "label" in other.meta:
            assert found.classes[mine.meta["label"]] == alone[part].classes[other.meta["label"]]
    with pytest.raises(IndexError):
        source.document(17, key(0, 0))
    assert found.tokenizer is not None
    assert found.tokenizer.decode(found.tokenizer.encode("before a picture", 16).tolist()) == "before a picture"


def test_a_mixture_opens_again_and_moves_with_its_sources(parts: list[Path], tmp_path: Path) -> None:
    first = mixed(parts, tmp_path / "mixed", 2, 1, 1)
    assert open_prepared(tmp_path / "mixed").hash() == first.hash()
    assert mixed(parts, tmp_path / "again", 2, 1, 1).hash() == first.hash()
    assert mixed(parts, tmp_path / "other", 1, 1, 1).hash() != first.hash()
    prepare(PrepareConfig(str(tmp_path / "docs"), parts[2], vocab_size=300, as_pairs=True))
    with pytest.raises(UserError, match="prepared anew: run `altsight mix` again"):
        open_prepared(tmp_path / "mixed")


def test_mistakes_in_a_mixture(parts: list[Path], tmp_path: Path) -> None:
    cases: list[tuple[MixConfig, str]] = [
        (MixConfig((), tmp_path / "m"), "two or more prepared folders"),
        (MixConfig((parts[0], parts[0]), tmp_path / "m"), "each once"),
        (MixConfig((parts[0], tmp_path), tmp_path / "m"), "is no prepared data set"),
        (MixConfig((parts[0], parts[1]), tmp_path / "m", (1.0,)), "2 sources take 2 weights above 0"),
        (MixConfig((parts[0], parts[1]), tmp_path / "m", (1.0, 0.0)), "2 sources take 2 weights above 0"),
        (MixConfig((parts[0], parts[1]), tmp_path / "shards"), "holds other files"),
        (MixConfig((parts[0], mixed(parts, tmp_path / "inner").directory), tmp_path / "m"), "is itself a mixture"),
    ]
    for config, words in cases:
        with pytest.raises(UserError, match=words):
            mix(config)
        assert not (tmp_path / "m").exists()


def test_weights_are_by_size_where_none_are_given(parts: list[Path], tmp_path: Path) -> None:
    source = mix(MixConfig(tuple(parts), tmp_path / "mixed", vocab_size=300)).source
    assert isinstance(source, Mixture)
    assert source.weights == (10.0, 6.0, 1.0)
    assert dataclasses.replace(source, weights=(1.0, 1.0, 1.0)).order(0).counts[0] in (341, 342)
