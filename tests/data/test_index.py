"""The offset index finds every part of every sample, and says what is wrong with a shard."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altsight.core.errors import UserError
from altsight.data.index import Index, Rows, open_index
from altsight.data.layout import find_layout
from altsight.data.record import BrokenSample
from altsight.data.scan import Reading, scan_shard
from tests.data.conftest import WriteShards, WriteTar


def indexed(source: str | Path) -> Index:
    """Return the index of the shards at `source`, which may hold no sample at all."""
    layout = find_layout(str(source))
    rows: list[Rows] = []
    scanned = [scan_shard(shard, Reading(), rows.append) for shard in layout.shards]
    return Index(tuple(found.shard for found in scanned), np.concatenate(rows))


def test_reads_every_sample(tmp_path: Path, write_shards: WriteShards) -> None:
    index = indexed(write_shards(tmp_path / "data", samples=10, per_shard=4))
    assert [Path(shard.path).name for shard in index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    assert index.starts.tolist() == [0, 4, 8, 10]
    assert index.rows.dtype.itemsize == 16
    for i in range(10):
        with tarfile.open(index.shards[i // 4].path) as tar:
            members = {s: tar.extractfile(f"{i:05d}.{s}").read() for s in ("png", "txt", "json")}  # type: ignore[union-attr]
        record = index.record(i)
        assert record.image == members["png"]
        assert record.fields == json.loads(members["json"]) | {"txt": members["txt"].decode()}


def test_name_leads_back_to_the_sample(tmp_path: Path, write_shards: WriteShards) -> None:
    index = indexed(write_shards(tmp_path / "data"))
    shard, offset = index.name(7).split("#")
    with open(shard, "rb") as file:
        file.seek(int(offset))
        assert file.read(9) == b"00007.png"


def test_thinned(tmp_path: Path, write_shards: WriteShards) -> None:
    index = indexed(write_shards(tmp_path / "data", samples=10, per_shard=4))
    for most, every in ((10, 1), (9, 2), (5, 2), (4, 3), (1, 10)):
        thin = index.thinned(most)
        assert [thin.record(i).image for i in range(len(thin))] == [index.record(i).image for i in range(0, 10, every)]
        assert thin.name(len(thin) - 1) == index.name((len(thin) - 1) * every)
    assert len(index.thinned(5).thinned(3)) == 3


def test_a_sample_that_changed_since_is_noticed(tmp_path: Path, write_shards: WriteShards) -> None:
    index = indexed(write_shards(tmp_path / "data"))
    path, at = index.name(5).split("#")
    data = bytearray(Path(path).read_bytes())
    data[int(at) + 512 + 40] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(BrokenSample, match="not those that were indexed"):
        index.record(5)
    index.record(4)
    Path(path).write_bytes(data[: int(at) + 700])
    with pytest.raises(BrokenSample, match="not those that were indexed"):
        index.record(5)


def test_an_index_that_is_mapped_pickles_without_its_rows(tmp_path: Path, write_shards: WriteShards) -> None:
    loose = indexed(write_shards(tmp_path / "data"))
    np.save(tmp_path / "index.npy", np.repeat(loose.rows, 10_000))
    many = [replace(shard, samples=shard.samples * 10_000) for shard in loose.shards]
    index = open_index(many, tmp_path / "index.npy", "again")
    assert len(index) == 100_000
    pickled = pickle.dumps(index)
    assert len(pickled) < 5000
    again = pickle.loads(pickled)
    assert isinstance(again.rows, np.memmap)
    assert again.record(77_777) == index.record(77_777)


def test_suffixes_missing_parts_and_strange_names(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {
        "a/1.JPG": b"one",
        "a/1.txt": b"t1",
        "b/1.jpeg": b"two",  # the same name in another folder is another sample
        "v1.0/2.webp": b"three",  # dots in the folder belong to the key
        "v1.0/2.json": b"{}",
        "3.txt": b"no image",
        "4.seg.png": b"mask",  # everything after the first dot is the suffix
        "4.jpg": b"four",
        "4.cls": b"7",
        "._5.jpg": b"junk",  # hidden files of macOS between the parts of a sample do not tear it apart
        "5.png": b"five",
        "._5.txt": b"junk",
        "README": b"no suffix",
        "5.txt": b"t5",
    }
    index = indexed(write_tar(tmp_path / "x.tar", members))
    parts = [(record.image, record.fields.get("txt")) for record in map(index.record, range(len(index)))]
    assert parts == [(b"one", "t1"), (b"two", None), (b"three", None), (b"four", None), (b"five", "t5")]
    assert index.record(3).fields["cls"] == 7


def test_folders_and_links_in_a_tar_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        long = tarfile.TarInfo("ü" * 150 + ".jpg")
        long.size = 3
        tar.addfile(long, io.BytesIO(b"abc"))
    index = indexed(path)
    assert [index.record(i).image for i in range(len(index))] == [b"abc"]


def test_file_folder_and_pattern_name_the_same_shards(tmp_path: Path, write_shards: WriteShards) -> None:
    folder = write_shards(tmp_path / "data")
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"metadata of img2dataset beside its tars")
    every = [str(path) for path in sorted(folder.glob("*.tar"))]
    sources = (folder, folder / "*.tar", folder / "0000[012].tar", folder / "{00000..00002}.tar")
    for source in (*sources, "::".join(every), f"file://{folder}/{{00000,00001,00002}}.tar"):
        assert [shard.path for shard in indexed(source).shards] == every
    assert [shard.path for shard in indexed(folder / "00001.tar").shards] == every[1:2]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path, write_shards: WriteShards) -> None:
    assert len(indexed(write_shards(tmp_path / "data[1]")).shards) == 3
    assert len(indexed(write_shards(tmp_path / "data{1,2}")).shards) == 3


@pytest.mark.parametrize("source", ["gone", "gone/*.tar", "empty", "{00000..00009}.tar", "{0}.tar"])
def test_sources_without_shards(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"does not exist|holds no|name no list") as caught:
        indexed(str(tmp_path / source))
    assert str(tmp_path) in str(caught.value)
    assert "give" in str(caught.value) or "write" in str(caught.value)


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {f"{i}.{s}": bytes([i + 1]) * 700 for i in range(3) for s in ("jpg", "txt")}
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    end = 6 * (512 + 1024)
    cuts = {"nothing": 0, "first header": 100, "inside a member": 512 + 300, "in the padding": 512 + 900}
    cuts |= {"between members": 2 * 1536, "inside a header": 2 * 1536 + 200, "before the end block": end}
    for name, length in cuts.items():
        path = tmp_path / "x.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file .*download it again or remove it"):
            indexed(path)
            pytest.fail(name)
    path.write_bytes(whole[: end + 512])
    assert len(indexed(path)) == 3


def test_files_that_are_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    gzipped = io.BytesIO()
    with tarfile.open(fileobj=gzipped, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    for data in (b"<html>not found</html>" * 100, gzipped.getvalue(), b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file"):
            indexed(path)


def test_shards_that_cannot_be_read(tmp_path: Path, write_shards: WriteShards) -> None:
    with pytest.raises(UserError, match=r"gone\.tar' does not exist"):
        indexed(tmp_path / "gone.tar")
    folder = write_shards(tmp_path / "data")
    index = indexed(folder)
    (folder / "00001.tar").unlink()
    assert index.record(0).fields["txt"] == "a picture of thing 0"
    with pytest.raises(UserError, match=r"00001\.tar' cannot be read any more .*altsight prepare"):
        index.record(5)


def with_header(tar: bytes, **fields: bytes) -> bytes:
    """Return `tar` with fields of its first header replaced and the sum of the header mended."""
    places = {"size": 124, "type": 156, "real_size": 483}
    changed = bytearray(tar)
    for name, value in fields.items():
        changed[places[name] : places[name] + len(value)] = value
    return mend_sum(changed, 0)


def mend_sum(tar: bytearray, header: int) -> bytearray:
    total = sum(tar[header : header + 148]) + 8 * 32 + sum(tar[header + 156 : header + 512])
    tar[header + 148 : header + 156] = b"%06o\0 " % total
    return tar


@pytest.mark.parametrize("size", [2**80, 2**63, 2**40, -512, -1, -(2**80)])
def test_impossible_sizes_are_refused(tmp_path: Path, small_tar: bytes, size: int) -> None:
    binary = (0x80 if size >= 0 else 0xFF).to_bytes(1, "big") + size.to_bytes(11, "big", signed=True)
    path = tmp_path / "x.tar"
    path.write_bytes(with_header(small_tar, size=binary))
    with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file"):
        indexed(path)


def test_sparse_members_cannot_be_read_by_range_and_are_left_out(tmp_path: Path, small_tar: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(with_header(small_tar, type=b"S", real_size=b"00000002000\0"))
    # "0.jpg" is the sparse one; "1.png" is there, and empty.
    index = indexed(path)
    assert [index.record(i).image for i in range(len(index))] == [b""]


def test_numbers_that_are_none_in_a_pax_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("0.jpg")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "many"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x" * 512))
    with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file"):
        indexed(path)


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    return write_tar(path, {"0.jpg": b"j" * 600, "0.txt": b"t", "0.json": b"{}", "1.png": b""}).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_tars_raise_nothing_but_user_errors(
    data: st.DataObject, small_tar: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mutated = bytearray(small_tar)
    for at in data.draw(st.lists(st.integers(0, 4 * 512), max_size=8)):
        mutated[at] = data.draw(st.integers(0, 255))
    header = data.draw(st.sampled_from([0, 512 + 1024, 512 * 5]))
    field, width = data.draw(st.sampled_from([(0, 100), (100, 8), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)]))
    mutated[header + field : header + field + width] = data.draw(st.binary(min_size=width, max_size=width))
    if data.draw(st.booleans()):  # a header that is wrong in itself but bears the right sum
        mend_sum(mutated, header)
    path = tmp_path_factory.getbasetemp() / "mutated.tar"
    path.write_bytes(mutated[: data.draw(st.integers(0, len(mutated)))])
    try:
        index = indexed(path)
    except UserError as error:
        assert "mutated.tar" in str(error)
        assert "\n" not in str(error)
    else:
        for i in range(len(index)):
            image = index.record(i).image
            assert image is None or len(image) <= index.rows["size"][i]


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=2000).filter(lambda data: not data or any(data[:512])))
def test_random_bytes_are_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"random\.tar"):
        indexed(path)
