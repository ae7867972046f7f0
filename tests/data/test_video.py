"""Frames of videos: the right ones, whatever the container; made videos; what does not decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.clips import moving, write_moving, write_video
from altsight.data.listing import Item
from altsight.data.record import BrokenSample
from altsight.data.video import Videos, dense_frames, is_video, read_frames, segment_frames

Pixels = npt.NDArray[np.uint8]
N = 30


def counting(frames: int = N, side: int = 32, width: int = 48) -> Pixels:
    """Return frames of one grey each, which tells their number: 8, 16, 24 ..."""
    greys = (8 * np.arange(1, frames + 1)).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (frames, side, width, 3)).copy()


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 8) - 1 for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("key_every", [1, 7, 100])
def test_the_wanted_frames_are_decoded(tmp_path: Path, suffix: str, key_every: int) -> None:
    write_video(tmp_path / f"a{suffix}", counting(), key_every=key_every)
    for wanted in ([0], [29], [3, 4, 28], [17, 2, 17, 0], list(range(N))):
        frames = read_frames(tmp_path / f"a{suffix}", lambda count, w=wanted: w if count == N else [])
        assert frames.shape == (len(wanted), 3, 32, 48) and frames.dtype == torch.uint8
        assert numbers(frames) == wanted


def test_b_frames_and_a_start_after_zero(tmp_path: Path) -> None:
    """Packets of H.264 are not in the order of their frames, and times need not begin at 0 or be even."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"bf": "3", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i, pixels in enumerate(counting()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 50 + i + (i > 20) * 40
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for wanted in ([5], [20, 21, 29], list(range(N))):
        assert numbers(read_frames(tmp_path / "a.mkv", lambda _, w=wanted: w)) == wanted


def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", counting(), key_every=5)
    monkeypatch.setattr("altsight.data.video._pixels", lambda frame, _: torch.tensor([frame.pts]))
    seen: list[int] = []
    real = av.container.InputContainer.seek
    frames = []

    class Counting:
        """A container that counts the frames that come out of it."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def decode(self, stream: Any) -> Any:
            for frame in self.inner.decode(stream):
                frames.append(frame.pts)
                yield frame

        def seek(self, at: int, stream: Any) -> None:
            seen.append(at)
            real(self.inner, at, stream=stream)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    from altsight.data.video import _decode

    with av.open(str(tmp_path / "a.mp4")) as container:
        _decode(Counting(container), container.streams.video[0], lambda _: [1, 27], 256)
    assert len(seen) == 2 and len(frames) <= 6


def test_folders_of_frames(tmp_path: Path) -> None:
    for i, pixels in enumerate(counting(5)):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    assert is_video(tmp_path)
    assert numbers(read_frames(tmp_path, lambda count: [4, 0, count - 2])) == [4, 0, 3]
    (tmp_path / "03.png").write_bytes(b"no picture")
    assert numbers(read_frames(tmp_path, lambda _: [0])) == [0], "only what is wanted is read"
    with pytest.raises(BrokenSample):
        read_frames(tmp_path, lambda _: [3])
    PIL.Image.fromarray(counting(1, 16)[0]).save(tmp_path / "03.png")
    with pytest.raises(BrokenSample, match="several sizes"):
        read_frames(tmp_path, lambda _: [0, 3])


def test_large_frames_are_made_smaller(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", counting(4, 240, 320))
    assert read_frames(tmp_path / "a.mp4", lambda _: [0], 24).shape == (1, 3, 24, 32)
    assert read_frames(tmp_path / "a.mp4", lambda _: [0]).shape == (1, 3, 240, 320)


def test_what_does_not_decode(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", counting())
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "frames").mkdir()
    for name in ("cut.mp4", "text.mp4", "empty.mp4", "frames", "missing.mp4"):
        with pytest.raises(BrokenSample):
            read_frames(tmp_path / name, lambda count: range(count))
    noise = bytearray(whole)
    noise[200 : len(whole) // 2] = bytes(
        np.random.default_rng(0).integers(0, 256, len(whole) // 2 - 200, dtype=np.uint8)
    )
    (tmp_path / "noise.mp4").write_bytes(bytes(noise))
    try:
        read_frames(tmp_path / "noise.mp4", lambda count: range(count))
    except BrokenSample as error:
        assert "\n" not in str(error)


def test_places_of_frames() -> None:
    assert segment_frames(16, 4, None) == [0, 4, 8, 12]
    assert segment_frames(16, 4, None, 0.5) == [2, 6, 10, 14]
    assert segment_frames(2, 4, None) == [0, 0, 1, 1] and segment_frames(1, 3, key(0, 0)) == [0, 0, 0]
    drawn = np.array([segment_frames(16, 4, key(0, i)) for i in range(200)])
    for segment in range(4):
        assert set(drawn[:, segment]) == set(range(4 * segment, 4 * segment + 4)), "anywhere in its segment"
    assert segment_frames(16, 4, key(0, 5)) == segment_frames(16, 4, key(0, 5))
    assert dense_frames(1000, 4, None) == [0, 16, 32, 48] and dense_frames(1000, 4, None, 1.0)[0] == 936
    starts = {dense_frames(70, 4, key(0, i))[0] for i in range(100)}
    assert starts == set(range(7)) and dense_frames(8, 4, None) == [0, 2, 4, 6]


def test_source_of_videos(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", counting())
    items = (Item(tmp_path / "a.mp4", "x"), Item(tmp_path / "b.mp4", "y"))
    train = Videos(items, ("x", "y"), 4)
    document = train.document(1, key(0, 3))
    assert document.meta["frames"].shape == (4, 3, 32, 48) and document.meta["label"] == 1
    assert torch.equal(train.document(1, key(0, 3)).meta["frames"], document.meta["frames"])
    test = Videos(items, ("x", "y"), 4, training=False, clips=2)
    assert numbers(test.document(0, key(0, 0)).meta["frames"]) == [0, 7, 15, 22, 3, 11, 18, 26]
    assert len(train.digest()) == 12 and train.digest() != Videos(items[:1], ("x", "y"), 4).digest()


def test_few_shots_are_drawn_by_a_seed() -> None:
    items = tuple(Item(Path(f"{name}{i}.mp4"), name) for name in "xy" for i in range(10))
    videos = Videos(items, ("x", "y"), 4)
    few = videos.few(2, seed=1)
    assert len(few) == 20 and len(set(few.items)) == 4, "repeated to the size of the whole set"
    assert [sum(item.label == name for item in few.items) for name in "xy"] == [10, 10]
    assert few.items == videos.few(2, seed=1).items != videos.few(2, seed=2).items
    with pytest.raises(UserError, match="--shots 11"):
        videos.few(11, seed=1)


def test_made_videos(tmp_path: Path) -> None:
    write_moving(tmp_path, ["red apple", "tractor"], 2, ("left", "up"), pixels=48, frames=6)
    folders = ["red apple moving left", "red apple moving up", "tractor moving left", "tractor moving up"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == folders
    assert (tmp_path / "classes.txt").read_text().splitlines() == folders
    frames = read_frames(tmp_path / folders[0] / "000.mp4", lambda count: range(count))
    assert frames.shape == (6, 3, 48, 48)
    again = tmp_path / "again"
    write_moving(again, ["red apple", "tractor"], 2, ("left", "up"), pixels=48, frames=6)
    assert torch.equal(read_frames(again / folders[0] / "000.mp4", lambda count: range(count)), frames)
    write_moving(tmp_path / "motions", ["red apple"], 1, ("left",), by="motion", suffix=".webm")
    write_moving(tmp_path / "objects", ["red apple"], 1, by="object")
    assert (tmp_path / "motions/left/000.webm").exists() and (tmp_path / "objects/red apple/000.mp4").exists()


def test_a_video_to_the_left_is_one_to_the_right_backwards() -> None:
    stamp = np.dstack([np.full((8, 8, 3), 9, np.uint8), np.full((8, 8), 255, np.uint8)])
    background = np.full((32, 32, 3), 200, np.uint8)
    left, right = (moving(stamp, motion, background, 5, key(0, 0)) for motion in ("left", "right"))
    assert np.array_equal(left, right[::-1])
    columns = [int((frame == 9).all(axis=2).any(axis=0).argmax()) for frame in right]
    assert columns == [0, 6, 12, 18, 24]
    up = moving(stamp, "up", background, 5, key(0, 0))
    rows = [int((frame == 9).all(axis=2).any(axis=1).argmax()) for frame in up]
    assert rows == [24, 18, 12, 6, 0]
