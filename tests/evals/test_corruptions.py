"""ImageNet-C's corruptions: pure functions with the published strengths; errors and mCE of a view."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals import corrupted
from altsight.evals.base import Result, Task
from altsight.evals.corrupted import ALEXNET, corruptions, read_baseline
from altsight.evals.corruption_blur import glass_blur, smear, zoomed
from altsight.evals.corruption_weather import brightness, fog, plasma
from altsight.evals.corruptions import CORRUPTIONS, corrupt
from tests.evals.conftest import make_view


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A picture (64, 80, 3) with edges, gradients and a texture."""
    rows, columns = np.mgrid[0:64, 0:80]
    pixels = np.stack([columns * 3, rows * 4, 128 + 60 * np.sin(columns / 3)], axis=2)
    pixels[20:44, 30:60] = (220, 60, 40)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_pure_function_of_its_key(name: str, picture: np.ndarray) -> None:
    before = picture.copy()
    first, again = (corrupt(picture, name, 3, key(0, 5, "c")) for _ in range(2))
    assert first.shape == picture.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and np.array_equal(picture, before) and not np.array_equal(first, picture)
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert np.array_equal(first, corrupt(picture, name, 3, key(0, 6, "c"))) != drawn


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("elastic_transform", "fog", "frost", "snow")])
def test_severity_grows(name: str, picture: np.ndarray) -> None:
    changes = [
        np.mean([np.abs(corrupt(picture, name, s, key(0, i, "c")).astype(int) - picture).mean() for i in range(4)])
        for s in (1, 3, 5)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_unknown_names_and_severities_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"no corruption 'frsot'\. Did you mean 'frost'"):
        corrupt(picture, "frsot", 1, key(0, 0, "c"))
    with pytest.raises(UserError, match="no severity 6 of 'fog'"):
        corrupt(picture, "fog", 6, key(0, 0, "c"))


def test_noise_has_its_published_strength() -> None:
    grey = np.full((256, 256, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 1, key(0, 0, "c")).astype(float) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.02)
    shot = corrupt(grey, "shot_noise", 1, key(0, 0, "c")).astype(float) / 255
    assert shot.std() == pytest.approx((0.5 / 60) ** 0.5, rel=0.03)
    impulse = corrupt(grey, "impulse_noise", 5, key(0, 0, "c"))
    assert (impulse != 128).mean() == pytest.approx(0.27, abs=0.005)
    assert (impulse == 255).mean() == pytest.approx((impulse == 0).mean(), abs=0.005)


def test_contrast_and_brightness_are_the_formula(picture: np.ndarray) -> None:
    unit = picture / 255
    mean = unit.mean(axis=(0, 1))
    expected = (((unit - mean) * 0.2 + mean) * 255).astype(np.uint8)
    assert np.array_equal(corrupt(picture, "contrast", 3, key(0, 0, "c")), expected)
    colorsys = pytest.importorskip("colorsys")
    found = brightness(unit, 2, np.random.default_rng())
    for row, column in ((0, 0), (5, 70), (30, 40), (63, 79)):
        h, s, v = colorsys.rgb_to_hsv(*unit[row, column])
        np.testing.assert_allclose(found[row, column], colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1)), atol=1e-9)


def test_jpeg_and_pixelate_are_pillows(picture: np.ndarray) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=7)
    assert np.array_equal(corrupt(picture, "jpeg_compression", 5, key(0, 0, "c")), PIL.Image.open(buffer))
    small = PIL.Image.fromarray(picture).resize((40, 32), PIL.Image.Resampling.BOX)
    assert np.array_equal(corrupt(picture, "pixelate", 2, key(0, 0, "c")), small.resize((80, 64), 4))


def test_glass_moves_pixels_no_farther_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.random.default_rng(0).permutation(24 * 30).reshape(24, 30, 1) / 720.0
    monkeypatch.setattr("altsight.evals.corruption_blur._gaussian", lambda x, sigma: x)
    moved = glass_blur(places, 2, np.random.default_rng(1))
    assert sorted(moved.ravel()) == sorted(places.ravel()), "pixels are exchanged, none is lost"
    # One round with shifts of -2 ... 1: the borders of two pixels are only reached from within.
    assert np.array_equal(moved[23, 29], places[23, 29])
    assert (moved != places).mean() > 0.5


def test_smear_is_a_convolution_with_half_a_gaussian(picture: np.ndarray) -> None:
    unit = picture / 255
    weights = np.exp(-0.5 * (np.arange(7) / 2) ** 2)
    kernel = np.zeros(13)
    kernel[6:] = weights / weights.sum()
    expected = ndimage.convolve1d(unit, kernel, axis=1, mode="nearest")
    np.testing.assert_allclose(smear(unit, 3, 2, 0.0), expected, atol=1e-12)
    np.testing.assert_allclose(smear(unit, 3, 2, 90.0), ndimage.convolve1d(unit, kernel, axis=0, mode="nearest"))


@pytest.mark.parametrize("zoom", [1.0, 1.01, 1.25, 2.0, 4.5])
def test_zooming_keeps_size_and_centre(zoom: float) -> None:
    spot = np.zeros((41, 57, 1))
    spot[20, 28] = 1
    found = zoomed(spot, zoom)
    assert found.shape == spot.shape
    centre = ndimage.center_of_mass(found[..., 0])
    assert centre == pytest.approx((20, 28), abs=zoom)


def test_plasma_is_a_fractal_in_the_unit_interval(picture: np.ndarray) -> None:
    smooth, rough = (plasma(100, 130, decay, np.random.default_rng(0)) for decay in (2.0, 1.2))
    for field in (smooth, rough):
        assert field.shape == (100, 130) and field.min() >= 0 and field.max() <= 1 and np.isfinite(field).all()
    steps = [np.abs(np.diff(field, axis=0)).mean() for field in (smooth, rough)]
    assert steps[0] < steps[1] / 2
    unit = picture / 255
    assert fog(unit, 5, np.random.default_rng(0)).max() <= unit.max() + 1e-9, "the brightest value stays"


@pytest.mark.parametrize("dual", [True, False], ids=["zero-shot", "linear probe"])
def test_errors_and_mce_of_a_view(dual: bool, colours: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupted, "SIDE", 8)
    view = make_view(dual=dual, batch_size=32)
    results = list(corruptions(view, colours))
    found = {r.metric: r for r in results}
    assert len(results) == 1 + 15 + 1 and found["clean_error"].value == 0
    errors = [found[f"error_{name}"].value for name in CORRUPTIONS]
    assert found["mean_error"].value == pytest.approx(np.mean(errors)) and 0 < np.mean(errors) < 1
    for name in CORRUPTIONS:
        r = found[f"error_{name}"]
        assert r.value == pytest.approx(np.mean(r.extra["severities"])) and len(r.extra["severities"]) == 5
        assert r.low <= r.value <= r.high and r.n == 24 and r.extra["seed"] == 0
    assert not any("pixels" in name for name in view.cache), "corrupted features are not kept"
    base = {name: 0.5 for name in CORRUPTIONS}
    mce = {r.metric: r for r in corruptions(view, replace(colours, corrupted_errors=base))}["mce"]
    assert mce.value == pytest.approx(np.mean(errors) / 0.5)


def test_baselines(tmp_path: Path) -> None:
    assert read_baseline("alexnet", "any") == ALEXNET
    assert list(ALEXNET) == list(CORRUPTIONS)
    errors = {name: 0.5 + i / 100 for i, name in enumerate(CORRUPTIONS)}
    results = [Result("t", "corruptions", f"error_{name}", error) for name, error in errors.items()]
    out = tmp_path / "baseline.json"
    out.write_text(json.dumps({"runs/a": [asdict(r) for r in results]}))
    assert read_baseline(str(out), "t") == errors
    out.write_text(json.dumps({"runs/a": [asdict(replace(r, value=0.0)) for r in results]}))
    with pytest.raises(UserError, match="makes no error under gaussian_noise"):
        read_baseline(str(out), "t")
    with pytest.raises(UserError, match=r"no\.json' cannot be read"):
        read_baseline(str(tmp_path / "no.json"), "t")
    (tmp_path / "some.json").write_text('{"a": []}')
    with pytest.raises(UserError, match="wrote for one model on the task 't'"):
        read_baseline(str(tmp_path / "some.json"), "t")
