"""Texts, names and tables from the web: read rightly or left out, and nothing is written or read outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.captions import LONGEST_TEXT, Captions
from altsight.data.decode import BrokenImage
from altsight.data.documents import Sampling
from altsight.data.index import Index, Rows
from altsight.data.layout import find_layout
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.record import table_record
from altsight.data.scan import Reading, scan_shard
from altsight.data.sources import Interleaves, Pairs
from altsight.data.tar import parse_tar
from tests.data.conftest import Picture, WriteTar

TEXTS: dict[str, tuple[bytes, str]] = {
    "nul": (b"a\0b\0", "ab"),
    "invalid": (b"caf\xe9 \xff\xfe", "caf\ufffd \ufffd\ufffd"),
    "lines": (b" a\r\n\tb\x0b c ", "a b c"),
    "bom": ("\ufeffwords".encode(), "words"),
    "right to left": ("\u202e\u05d0\u05d1".encode(), "\u202e\u05d0\u05d1"),
    "a megabyte": (b"x" * 2**20, "x" * LONGEST_TEXT),
    "two megabytes": (b"y" * 2**21, "y" * LONGEST_TEXT),
    "markup": (b"<script>alert(1)</script>", "<script>alert(1)</script>"),
    "control": (b"<end> <pad> [/red]", "<end> <pad> [/red]"),
}


def test_texts_in_tars(tmp_path: Path, picture: Picture, write_tar: WriteTar) -> None:
    members: dict[str, bytes] = {}
    for number, (data, _) in enumerate(TEXTS.values()):
        members |= {f"{number}.png": picture(number), f"{number}.txt": data}
    prepared = prepare(PrepareConfig(str(write_tar(tmp_path / "x.tar", members)), tmp_path / "out", vocab_size=300))
    assert prepared.tokenizer is not None
    for number, (name, (_, text)) in enumerate(TEXTS.items()):
        document = prepared.source.document(number, key(0, number))
        assert document.texts == ((text,) if text else ()), name
        for found in document.texts:
            ids = prepared.tokenizer.encode(found, 32)
            assert (ids == prepared.tokenizer.end).sum() == 1  # text that spells the end token is no end


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/../../../evil", "C:\\evil", "~/evil", "x" * 5000, "\N{BELL}\x1b[31m"]
)
def test_names_in_tars_lead_nowhere(name: str, tmp_path: Path, picture: Picture, write_tar: WriteTar) -> None:
    (tmp_path / "in").mkdir()
    path = write_tar(tmp_path / "in" / "x.tar", {f"{name}.png": picture(), f"{name}.txt": b"words"})
    before = {p for p in tmp_path.rglob("*")}
    pairs = read_pairs(str(path))
    assert pairs.document(0, key(0, 0)).images == (picture(),)
    assert {p for p in tmp_path.rglob("*")} == before
    assert "\x1b" not in pairs.name(0)


JSONS = [
    *(b"[" * 100_000, b'{"a":' * 50_000, b"{" + b'"k":1,' * 10**5 + b'"z":2}', b'{"caption": 1e999}', b"nan", b""),
    *(b'{"txt": "\\ud83d"}', b'{"txt": 1' + b"0" * 5000 + b"}", b"\xff\xfe{}", b'{"title": {"deep": [[[[]]]]}}'),
]


@pytest.mark.parametrize("data", JSONS, ids=range(len(JSONS)))
def test_json_parts(data: bytes, tmp_path: Path, picture: Picture, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.png": picture(), "0.json": data, "0.txt": b"words"})
    pairs = read_pairs(str(path), ("{txt}", "{title}", "{a}", "{caption}"))
    document = pairs.document(0, key(0, 0))
    assert document.images == (picture(),)
    assert all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in document.texts)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["image", "txt", "caption", "captions", "text_list", "image_info", "images", "texts", "label"])


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=6))
def test_any_row_of_a_table_is_a_record(fields: dict[str, Any]) -> None:
    record = table_record(fields)
    assert record.image is None or isinstance(record.image, bytes | str)
    for captions in (Captions(), Captions(("{captions[]}", "{label}, {txt}", "{a.b}"))):
        for caption in captions(record.fields):
            assert caption == caption.strip() != ""
            caption.encode()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=3000))
def test_any_bytes_parse_as_a_run_of_members(data: bytes) -> None:
    parse_tar(data)
    parse_tar(data.ljust(512, b"\0") + data)


def scanned(path: Path) -> Index:
    layout = find_layout(str(path))
    rows: list[Rows] = []
    shards = [scan_shard(shard, Reading(documents=False), rows.append).shard for shard in layout.shards]
    return Index(tuple(shards), np.concatenate(rows))


@settings(max_examples=120, deadline=None)
@given(data=st.binary(max_size=1500), kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet", "arrow"]))
def test_damaged_tables_raise_nothing_but_user_errors(
    data: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(data)
    try_all(path)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet", "arrow"]))
def test_tables_with_damage_raise_nothing_but_user_errors(
    data: st.DataObject, kind: str, tables: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(tables[kind])
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=6)):
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"mutated.{kind}"
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try_all(path)


def try_all(path: Path) -> None:
    try:
        index = scanned(path)
        pairs, documents = Pairs(index), Interleaves(index, None, Sampling())
        for i in range(len(index)):
            for source in (pairs, documents):
                try:
                    source.document(i, key(0, i))
                except BrokenImage as error:
                    assert str(error)
    except UserError as error:
        assert path.name in str(error)
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def tables(picture: Picture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("tables")
    columns: dict[str, list[Any]] = {"image": [picture(i) for i in range(3)], "text": ["a", 'b "c", d', "e\nf"]}
    table = pa.table(columns)
    pq.write_table(table, folder / "t.parquet", row_group_size=2)
    with pa.ipc.new_stream(str(folder / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    rows = [{"image": f"{i}.png", "text": text} for i, text in enumerate(columns["text"])]
    quoted = "".join('{image},"{0}"\n'.format(row["text"].replace('"', '""'), **row) for row in rows)
    return {
        "parquet": (folder / "t.parquet").read_bytes(),
        "arrow": (folder / "t.arrow").read_bytes(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "csv": f"image,text\n{quoted}".encode(),
        "tsv": f"image,text\n{quoted}".replace(",", "\t").encode(),
    }
