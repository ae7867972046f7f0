"""The offset index finds every part of every sample, and says what is wrong with a shard."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altsight.core.errors import UserError
from altsight.data.index import find_shards, index_shards
from tests.data.conftest import WriteShards, WriteTar


def test_reads_the_parts_of_every_sample(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = find_shards(write_shards(tmp_path / "data", samples=10, per_shard=4))
    seen: list[Path] = []
    index = index_shards(shards, seen.append)
    assert [s.name for s in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert seen == shards
    assert len(index) == 10
    assert index.samples["shard"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for i, path in ((0, shards[0]), (3, shards[0]), (9, shards[2])):
        with tarfile.open(path) as tar:
            for read, suffix in ((index.image, "png"), (index.text, "txt"), (index.json, "json")):
                member = tar.extractfile(f"{i:05d}.{suffix}")
                assert member is not None
                assert read(i) == member.read()


def test_name_leads_back_to_the_image(tmp_path: Path, write_shards: WriteShards) -> None:
    index = index_shards(find_shards(write_shards(tmp_path / "data")))
    shard, offset = index.name(7).split("#")
    with open(shard, "rb") as file:
        file.seek(int(offset))
        assert file.read(8) == index.image(7)[:8] == b"\x89PNG\r\n\x1a\n"


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
    index = index_shards([write_tar(tmp_path / "x.tar", members)])
    parts = [(index.image(i), index.text(i), index.json(i)) for i in range(len(index))]
    assert parts == [
        (b"one", b"t1", b""),
        (b"two", b"", b""),
        (b"three", b"", b"{}"),
        (b"four", b"", b""),
        (b"five", b"t5", b""),
    ]


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
    index = index_shards([path])
    assert [index.image(i) for i in range(len(index))] == [b"abc"]


def test_file_folder_and_pattern_name_the_same_shards(tmp_path: Path, write_shards: WriteShards) -> None:
    folder = write_shards(tmp_path / "data")
    (folder / "00000_stats.json").write_text("{}")
    every = sorted(folder.glob("*.tar"))
    for source in (folder, folder / "*.tar", folder / "0000[012].tar"):
        assert find_shards(source) == every
    assert find_shards(folder / "00001.tar") == every[1:2]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path, write_shards: WriteShards) -> None:
    assert len(find_shards(write_shards(tmp_path / "data[1]"))) == 3


@pytest.mark.parametrize("source", ["gone", "gone/*.tar", "empty", "{00000..00009}.tar"])
def test_sources_without_shards(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"does not exist|holds no \.tar|matches no \.tar") as caught:
        find_shards(str(tmp_path / source))
    assert str(tmp_path) in str(caught.value)
    assert "give" in str(caught.value)


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
            index_shards([path])
            pytest.fail(name)
    path.write_bytes(whole[: end + 512])
    assert len(index_shards([path])) == 3


def test_files_that_are_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    gzipped = io.BytesIO()
    with tarfile.open(fileobj=gzipped, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    for data in (b"<html>not found</html>" * 100, gzipped.getvalue(), b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file"):
            index_shards([path])


def test_shards_that_cannot_be_read(tmp_path: Path, write_shards: WriteShards) -> None:
    with pytest.raises(UserError, match=r"gone\.tar' cannot be read"):
        index_shards([tmp_path / "gone.tar"])
    folder = write_shards(tmp_path / "data")
    index = index_shards(find_shards(folder))
    (folder / "00001.tar").unlink()
    assert index.text(0) == b"a picture of thing 0"
    with pytest.raises(UserError, match=r"00001\.tar' cannot be opened any more .*altsight prepare"):
        index.text(5)


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
        index_shards([path])


def test_sparse_members_cannot_be_read_by_range_and_are_left_out(tmp_path: Path, small_tar: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(with_header(small_tar, type=b"S", real_size=b"00000002000\0"))
    index = index_shards([path])
    assert [index.image(i) for i in range(len(index))] == [b""]


def test_numbers_that_are_none_in_a_pax_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("0.jpg")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "many"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x" * 512))
    with pytest.raises(UserError, match=r"x\.tar' is truncated or not a tar file"):
        index_shards([path])


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
        index = index_shards([path])
    except UserError as error:
        assert "mutated.tar" in str(error)
        assert "\n" not in str(error)
    else:
        for i in range(len(index)):
            assert len(index.image(i)) == index.samples["image_size"][i]


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=2000).filter(lambda data: not data or any(data[:512])))
def test_random_bytes_are_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"random\.tar"):
        index_shards([path])
