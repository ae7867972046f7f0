"""Slides of every kind are read part by part, to the same pixels; tiles lie where they should."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile
from skimage import filters

from altsight.core.errors import UserError
from altsight.data.slide import PictureSlide, Slide, TiffSlide, VendorSlide, open_slide, thumbnail
from altsight.data.tiles import Tiling, coloured, grid, otsu, read_coords, read_tiles, tiling

Pixels = npt.NDArray[np.uint8]


def picture(height: int = 300, width: int = 420, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: Pixels, **options: object) -> Path:
    tifffile.imwrite(path, pixels, photometric="rgb", **options)
    return path


def pyramid(path: Path, pixels: Pixels, description: str = "") -> Path:
    """Write level 0 and one of half the size, as Aperio's scanner names and lays them out."""
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate((pixels, pixels[::2, ::2])):
            file.write(
                np.ascontiguousarray(level),
                photometric="rgb",
                tile=(64, 64),
                description=description,
                metadata=None,
                subfiletype=int(number > 0),
            )
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (64, 64)},
        {"tile": (64, 64), "compression": "zlib"},
        {"rowsperstrip": 7},
        {"rowsperstrip": 32, "compression": "lzw", "predictor": True},
        {"tile": (64, 64), "bigtiff": True, "compression": "zstd"},
    ],
    ids=str,
)
def test_any_part_of_a_tiff_has_its_pixels(tmp_path: Path, options: dict[str, object]) -> None:
    pixels = picture()
    slide = open_slide(write(tmp_path / "a.tif", pixels, **options))
    assert isinstance(slide, TiffSlide) and slide.size == (420, 300)
    whole = np.pad(pixels, ((0, 200), (0, 200), (0, 0)), constant_values=255)
    for left, top, side in ((0, 0, 64), (3, 5, 130), (60, 60, 8), (400, 290, 64), (100, 0, 300)):
        assert np.array_equal(slide.read(left, top, 0, side), whole[top : top + side, left : left + side])


def test_grey_16_bit_and_transparent_tiffs(tmp_path: Path) -> None:
    pixels = picture()
    tifffile.imwrite(tmp_path / "grey.tif", pixels[..., 0], photometric="minisblack", tile=(64, 64))
    tifffile.imwrite(tmp_path / "deep.tif", pixels.astype(np.uint16) << 8, photometric="rgb", tile=(64, 64))
    alpha = np.dstack([pixels, pixels[..., :1]])
    tifffile.imwrite(tmp_path / "alpha.tif", alpha, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    both = np.dstack([pixels[..., 0], pixels[..., 1]])
    tifffile.imwrite(
        tmp_path / "both.tif", both, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
    )
    for name in ("grey.tif", "both.tif"):
        grey = open_slide(tmp_path / name).read(5, 6, 0, 40)
        assert np.array_equal(grey, pixels[6:46, 5:45, :1].repeat(3, axis=2))
    for name in ("deep.tif", "alpha.tif"):
        assert np.array_equal(open_slide(tmp_path / name).read(5, 6, 0, 40), pixels[6:46, 5:45])


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_a_chunk_that_was_never_written_is_white(tmp_path: Path, compression: str | None) -> None:
    chunks = (None if i == 2 else np.full((64, 64, 3), 50, np.uint8) for i in range(4))
    path, kind = tmp_path / "a.tif", {"shape": (128, 128, 3), "dtype": np.uint8, "tile": (64, 64)}
    tifffile.imwrite(path, chunks, photometric="rgb", compression=compression, **kind)
    read = open_slide(path).read(0, 0, 0, 128)
    assert (read[64:, :64] == 255).all() and (read[:64] == 50).all()


def test_all_readers_agree(tmp_path: Path) -> None:
    pixels = picture()
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    aperio = pyramid(tmp_path / "a.svs", pixels, "Aperio Image Library\n420x300|AppMag = 40|MPP = 0.25")
    slides: list[Slide] = [PictureSlide(tmp_path / "a.png"), VendorSlide(aperio), TiffSlide(aperio)]
    assert isinstance(open_slide(aperio), VendorSlide)
    for slide in slides:
        assert slide.size == (420, 300)
        assert np.array_equal(slide.read(31, 17, 0, 100), pixels[17:117, 31:131])
    assert slides[1].magnification == slides[2].magnification == 40


def test_levels_of_a_pyramid(tmp_path: Path) -> None:
    pixels = picture()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="rgb", tile=(64, 64), subifds=1)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), photometric="rgb", tile=(64, 64), subfiletype=1)
    aperio = pyramid(tmp_path / "a.svs", pixels, "Aperio Image Library")
    for slide in (TiffSlide(tmp_path / "a.tif"), VendorSlide(aperio)):
        assert slide.downsamples == pytest.approx((1, 2), abs=0.01)
        assert np.array_equal(slide.read(64, 32, 1, 50), pixels[32:132:2, 64:164:2])


def test_level_is_the_one_whose_size_fits_the_magnification(tmp_path: Path) -> None:
    aperio = VendorSlide(pyramid(tmp_path / "a.svs", picture(), "Aperio |AppMag = 40"))
    assert tiling(aperio, 256, 20) == Tiling(256, level=1, read=256, span=512)
    assert tiling(aperio, 256, 40) == Tiling(256, level=0, read=256, span=256)
    # No level is four times smaller: read more pixels of level 0.
    assert tiling(aperio, 256, 10) == Tiling(256, level=0, read=1024, span=1024)
    plain = open_slide(write(tmp_path / "a.tif", picture(), tile=(64, 64)))
    assert tiling(plain, 256, 20) == Tiling(256, level=0, read=256, span=256)


def test_tiles_come_in_batches_and_are_resized(tmp_path: Path) -> None:
    pixels = picture(256, 256)
    slide = open_slide(write(tmp_path / "a.tif", pixels, tile=(64, 64)))
    coords = grid(slide.size, 64, 64)
    batches = list(read_tiles(slide, coords, Tiling(64, 0, 64, 64), batch=6))
    assert [len(batch) for batch in batches] == [6, 6, 4]
    left, top = coords[7]
    assert np.array_equal(batches[1][1].permute(1, 2, 0).numpy(), pixels[top : top + 64, left : left + 64])
    (large,) = read_tiles(slide, coords[:1], Tiling(32, 0, 64, 64), batch=6)
    assert large.shape == (1, 3, 32, 32)


def test_grid_covers_everything() -> None:
    coords = grid((100, 70), 32, 32)
    assert coords.tolist()[:4] == [[0, 0], [32, 0], [64, 0], [68, 0]] and len(coords) == 4 * 3
    seen = np.zeros((70, 100), bool)
    for left, top in coords:
        seen[top : top + 32, left : left + 32] = True
    assert seen.all()
    assert grid((32, 32), 32, 32).tolist() == [[0, 0]]
    assert len(grid((64, 64), 32, 16)) == 9
    with pytest.raises(UserError, match="lower --tile"):
        grid((31, 500), 32, 32)


def test_thumbnail_is_the_picture_made_small(tmp_path: Path) -> None:
    smooth = np.asarray(PIL.Image.fromarray(picture(6, 8)).resize((3200, 2400), PIL.Image.Resampling.BICUBIC))
    slide = open_slide(write(tmp_path / "a.tif", smooth, tile=(128, 128)))
    small = thumbnail(slide, 160)
    assert small.shape == (120, 160, 3)
    expected = np.asarray(PIL.Image.fromarray(smooth).resize((160, 120), PIL.Image.Resampling.BOX))
    assert np.abs(small.astype(int) - expected).max() <= 1
    assert thumbnail(slide, 9999).shape == (2400, 3200, 3)


def test_otsu_equals_scikit_image() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(60, 12, 700), rng.normal(190, 20, 300)]).clip(0, 255).astype(np.int64)
    assert otsu(values) == filters.threshold_otsu(values.astype(np.uint8))


def test_foreground_is_what_is_coloured(tmp_path: Path) -> None:
    pixels = np.full((512, 512, 3), 240, np.uint8)
    pixels[128:256, 256:384] = (200, 90, 160)
    pixels[400:410, 0:10] = (200, 90, 160)  # a speck, less than a quarter of its tile
    slide = open_slide(write(tmp_path / "a.tif", pixels, tile=(64, 64)))
    coords = grid(slide.size, 64, 64)
    found = coords[coloured(slide, coords, 64, least=0.25)]
    assert found.tolist() == [[256, 128], [320, 128], [256, 192], [320, 192]]


def test_coordinates_of_other_programs(tmp_path: Path) -> None:
    places = np.array([[0, 64], [128, 0]])
    np.save(tmp_path / "a.npy", places)
    (tmp_path / "a.csv").write_text("x,y\n0,64\n128,0\n")
    for name in ("a.npy", "a.csv"):
        assert read_coords(tmp_path / name).tolist() == places.tolist()
    np.save(tmp_path / "flat.npy", places.ravel())
    (tmp_path / "b.csv").write_text("left,top\n0,64\n")
    (tmp_path / "c.txt").write_text("0 64\n")
    for name, content in (("empty.npy", ""), ("empty.csv", ""), ("words.csv", "x,y\na,b\n"), ("gap.csv", "x,y\n1,\n")):
        (tmp_path / name).write_text(content)
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    wrong = ("none.npy", "flat.npy", "b.csv", "c.txt", "empty.npy", "empty.csv", "words.csv", "gap.csv", "words.npy")
    for name in wrong:
        with pytest.raises(UserError, match=name):
            read_coords(tmp_path / name)


def test_coordinates_of_clam(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = np.array([[0, 64], [128, 0]])
    assert read_coords(tmp_path / "a.h5").tolist() == [[0, 64], [128, 0]]


def test_what_is_no_slide_is_refused_in_a_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tif", picture(), tile=(64, 64), compression="zlib").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tif").write_bytes(b"no tiff")
    (tmp_path / "none.svs").write_bytes(b"no slide")
    (tmp_path / "none.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_bytes(b"text")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((64, 64, 3), np.float32), photometric="rgb")
    tifffile.imwrite(
        tmp_path / "planar.tif", np.zeros((3, 64, 64), np.uint8), photometric="rgb", planarconfig="separate"
    )
    for name in ("missing.tif", "none.tif", "none.svs", "none.png", "a.txt", "float.tif", "planar.tif"):
        with pytest.raises(UserError, match=name):
            open_slide(tmp_path / name)
    with pytest.raises(UserError, match=r"cut\.tif"):
        slide = open_slide(tmp_path / "cut.tif")
        thumbnail(slide)


def test_a_picture_in_one_piece_is_refused_if_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altsight.data.slide.CHUNK_BYTES", 10_000)
    path = write(tmp_path / "a.tif", picture(), rowsperstrip=300)
    with pytest.raises(UserError, match="tiled TIFF"):
        open_slide(path)
