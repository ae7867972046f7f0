"""Recipes survive JSON, and wrong settings are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from altsight.core.config import OptimConfig, from_dict, read_json, to_dict, write_json
from altsight.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Nested:
    optim: OptimConfig = field(default_factory=OptimConfig)
    path: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    width: int | None = None
    kind: Literal["a", "b"] = "a"
    on: bool = False


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = Nested(OptimConfig(lr=0.1, betas=(0.9, 0.98)), "data", (3,), 7, "b", True)
    write_json(tmp_path / "run.json", to_dict(config))
    assert from_dict(read_json(tmp_path / "run.json"), Nested, "run.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_missing_keys_take_their_defaults_and_whole_numbers_serve_as_floats() -> None:
    config = from_dict({"optim": {"lr": 1}}, Nested, "here")
    assert config == Nested(OptimConfig(lr=1.0))
    assert isinstance(config.optim.lr, float)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"optim": {"lrr": 1}}, "lrr"),
        ({"optim": {"lr": "fast"}}, "here.optim.lr"),
        ({"optim": {"lr_base_batch": 3.5}}, "here.optim.lr_base_batch"),
        ({"optim": [1]}, "here.optim"),
        ({"on": "false"}, "here.on"),
        ({"on": 1}, "here.on"),
        ({"sizes": [1, "2"]}, "here.sizes"),
        ({"width": "wide"}, "here.width"),
        ({"kind": "c"}, "here.kind"),
        ({"path": None}, "here.path"),
        ([1], "here"),
        (None, "here"),
    ],
)
def test_wrong_settings_are_named(data: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_dict(data, Nested, "here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json' does not exist"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json' is no JSON"):
        read_json(tmp_path / "half.json")


def test_peak_lr_scales_with_the_batch_unless_it_is_absolute() -> None:
    assert OptimConfig(lr=0.001, lr_base_batch=256).peak_lr(1024) == pytest.approx(0.004)
    assert OptimConfig(lr=0.001, lr_base_batch=0).peak_lr(1024) == 0.001


def test_did_you_mean() -> None:
    assert did_you_mean("clop", ["clip", "mae"]) == " Did you mean 'clip'?"
    assert did_you_mean("zzz", ["mae", "clip"]) == " Known: clip, mae."
