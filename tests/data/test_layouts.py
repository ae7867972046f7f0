"""Every layout that a corpus comes in yields the same documents."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.cache import Cache
from altsight.data.prepare import PrepareConfig, prepare, read_pairs
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.record import BrokenSample
from altsight.data.sources import Interleaves, Pairs
from tests.data.conftest import Picture, WriteTar

COUNT = 12
TEXTS = [f'a picture, "number" {i},\nof a thing' for i in range(COUNT)]
KINDS = [["cat", "dog"][i % 2] for i in range(COUNT)]
Layout = Callable[[Path, Sequence[bytes]], Path]


@pytest.fixture(scope="module")
def pictures(picture: Picture) -> list[bytes]:
    return [picture(i, (24, 20)) for i in range(COUNT)]


def loose(folder: Path, pictures: Sequence[bytes]) -> list[str]:
    (folder / "img" / "deep").mkdir(parents=True)
    names = [f"img/{'deep/' * (i % 2)}{i:03d}.png" for i in range(COUNT)]
    for name, data in zip(names, pictures, strict=True):
        (folder / name).write_bytes(data)
    return names


def csv_with_paths(folder: Path, pictures: Sequence[bytes]) -> Path:
    return _text_table(folder, pictures, "csv", ",")


def tsv_with_paths(folder: Path, pictures: Sequence[bytes]) -> Path:
    return _text_table(folder, pictures, "tsv", "\t")


def _text_table(folder: Path, pictures: Sequence[bytes], suffix: str, delimiter: str) -> Path:
    with (folder / f"table.{suffix}").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["File_Name", "Caption", "kind"])
        table.writerows(zip(loose(folder, pictures), TEXTS, KINDS, strict=True))
    return folder


def json_lines_with_paths(folder: Path, pictures: Sequence[bytes]) -> Path:
    rows = zip(loose(folder, pictures), TEXTS, KINDS, strict=True)
    lines = [json.dumps({"image": name, "text": text, "kind": kind}) for name, text, kind in rows]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines))
    return folder / "metadata.jsonl"


def parquet_with_paths(folder: Path, pictures: Sequence[bytes]) -> Path:
    pq.write_table(pa.table({"path": loose(folder, pictures), "caption": TEXTS, "kind": KINDS}), folder / "a.parquet")
    return folder


def hugging_face_parquet(folder: Path, pictures: Sequence[bytes]) -> Path:
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    for number, part in enumerate((slice(0, 7), slice(7, COUNT))):
        table = pa.table({"kind": KINDS[part], "image": images[part], "text": TEXTS[part]})
        pq.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    return folder


def img2dataset_parquet(folder: Path, pictures: Sequence[bytes]) -> Path:
    status = ["success"] * COUNT
    table = {"key": [str(i) for i in range(COUNT)], "jpg": list(pictures), "caption": TEXTS, "kind": KINDS}
    pq.write_table(pa.table(table | {"status": status}), folder / "00000.parquet")
    return folder / "*.parquet"


def saved_data_set(folder: Path, pictures: Sequence[bytes]) -> Path:
    import datasets

    rows = {"image": [{"bytes": data, "path": None} for data in pictures], "caption": TEXTS, "kind": KINDS}
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "kind": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def arrow_file(folder: Path, pictures: Sequence[bytes]) -> Path:
    table = pa.table({"image": list(pictures), "caption": TEXTS, "kind": KINDS})
    with pa.ipc.new_file(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return folder / "data.arrow"


def tar_of_captions(folder: Path, pictures: Sequence[bytes]) -> Path:
    """Captions in the JSON part, keys with folders, and names too long for a plain header."""
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, data in enumerate(pictures):
            for suffix, part in (("json", json.dumps({"kind": KINDS[i], "txt": TEXTS[i]}).encode()), ("png", data)):
                info = tarfile.TarInfo(f"{'long folder name/' * 9}{i}.{suffix}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    return folder


LAYOUTS: list[Layout] = [
    *(csv_with_paths, tsv_with_paths, json_lines_with_paths, parquet_with_paths, hugging_face_parquet),
    *(img2dataset_parquet, saved_data_set, arrow_file, tar_of_captions),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("cached", [False, True])
def test_pairs(layout: Layout, cached: bool, pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = layout(tmp_path / "data", pictures)
    prepared = prepare(PrepareConfig(str(source), tmp_path / "out", label="kind", vocab_size=300))
    found = prepared.source.cached(Cache(tmp_path / "cache", 10**8) if cached else None)
    assert isinstance(found, Pairs)
    assert (len(found), found.classes) == (COUNT, ("cat", "dog"))
    for i in reversed(range(COUNT)):
        document = found.document(i, key(0, i))
        assert document.images == (pictures[i],)
        assert document.texts == (" ".join(TEXTS[i].split()),)
        assert document.meta == {"label": i % 2}
    assert prepared.statistics["with_caption"] == COUNT
    assert [read_pairs(str(source)).image(i) for i in range(COUNT)] == pictures


def test_a_folder_for_each_class(pictures: list[bytes], tmp_path: Path) -> None:
    for i, data in enumerate(pictures):
        path = tmp_path / "tree" / KINDS[i] / "deeper" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "tree" / ".hidden").mkdir()
    (tmp_path / "tree" / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "tree" / "README.md").write_text("about")
    prepared = prepare(PrepareConfig(str(tmp_path / "tree"), tmp_path / "out"))
    assert prepared.classes == ("cat", "dog")
    assert prepared.tokenizer is None
    order = [i for kind in ("cat", "dog") for i in range(COUNT) if KINDS[i] == kind]
    documents = [prepared.source.document(i, key(0, i)) for i in range(COUNT)]
    assert [document.images for document in documents] == [(pictures[i],) for i in order]
    assert [document.meta["label"] for document in documents] == [0] * 6 + [1] * 6
    pairs = read_pairs(str(tmp_path / "tree"))  # as a task of an evaluation is read, without writing there
    assert (len(pairs), pairs.classes, pairs.image(6)) == (COUNT, ("cat", "dog"), documents[6].images[0])
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert open_prepared(moved).source.document(0, key(0, 0)).images == (pictures[0],)


def test_images_alone(pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, data in enumerate(pictures):
        (tmp_path / "flat" / f"{i:02d}.png").write_bytes(data)
    prepared = prepare(PrepareConfig(str(tmp_path / "flat"), tmp_path / "out"))
    assert prepared.classes == ()
    assert [prepared.source.document(i, key(0, i)).images[0] for i in range(COUNT)] == pictures


def test_several_captions_a_sample(pictures: list[bytes], tmp_path: Path) -> None:
    rows = [{"image": n, "captions": [f"one {n}", f"two {n}"]} for n in loose(tmp_path, pictures)]
    (tmp_path / "coco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for captions in (("{txt}",), ("{captions[]}",)):
        found = read_pairs(str(tmp_path / "coco.jsonl"), captions)
        assert found.all_captions(0) == ["one img/000.png", "two img/000.png"]
    assert read_pairs(str(tmp_path / "coco.jsonl"), ("{captions}",)).all_captions(0) == [
        "one img/000.png, two img/000.png"
    ]


def mmc4(pictures: int) -> list[dict[str, Any]]:
    """Three documents that share out the pictures; the last names one that nobody has."""
    documents = []
    for number in range(3):
        mine = range(number, pictures, 3)
        info = [
            {"image_name": f"{i:03d}.png", "raw_url": f"http://x/{i}", "matched_text_index": n, "matched_sim": 0.3}
            for n, i in enumerate(mine)
        ]
        documents.append({"text_list": [f"sentence {i}" for i in mine], "image_info": info})
    documents[2]["image_info"][0]["image_name"] = "nobody.png"
    documents[2]["image_info"][0]["raw_url"] = "http://nobody"
    return documents


def images_loose(folder: Path, pictures: Sequence[bytes], write_tar: WriteTar) -> str:
    (folder / "images").mkdir()
    for i, data in enumerate(pictures):
        (folder / "images" / f"{i:03d}.png").write_bytes(data)
    return ""


def images_in_tars_by_name(folder: Path, pictures: Sequence[bytes], write_tar: WriteTar) -> str:
    for number in range(2):
        members = {f"{i:03d}.png": pictures[i] for i in range(number, len(pictures), 2)}
        write_tar(folder / "shards" / f"{number}.tar", members)
    return str(folder / "shards")


def images_in_tars_by_url(folder: Path, pictures: Sequence[bytes], write_tar: WriteTar) -> str:
    members: dict[str, bytes] = {}
    for i, data in enumerate(pictures):
        members |= {f"k{i}.jpg": data, f"k{i}.json": json.dumps({"url": f"http://x/{i}"}).encode()}
    return str(write_tar(folder / "shards" / "0.tar", members))


def images_in_parquet(folder: Path, pictures: Sequence[bytes], write_tar: WriteTar) -> str:
    urls = [f"http://x/{i}" for i in range(len(pictures))]
    pq.write_table(pa.table({"url": urls, "jpg": list(pictures)}), folder / "images.parquet", row_group_size=5)
    return str(folder / "images.parquet")


PLACES = [images_loose, images_in_tars_by_name, images_in_tars_by_url, images_in_parquet]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_documents_of_mmc4(place: Any, pictures: list[bytes], tmp_path: Path, write_tar: WriteTar) -> None:
    (tmp_path / "docs").mkdir()
    images = place(tmp_path / "docs", pictures, write_tar)
    lines = [json.dumps(document) for document in mmc4(COUNT)]
    (tmp_path / "docs" / "docs_shard_0_v2.jsonl").write_text("\n".join(lines))
    source = str(tmp_path / "docs" / "docs_shard_0_v2.jsonl")
    prepared = prepare(PrepareConfig(source, tmp_path / "out", images=images, vocab_size=300))
    found = open_prepared(tmp_path / "out").source
    assert isinstance(found, Interleaves)
    assert (len(found), prepared.statistics["captions"]) == (3, COUNT)
    for number in range(3):
        document = found.document(number, key(0, number))
        mine = list(range(number, COUNT, 3))[1 if number == 2 else 0 :]
        assert document.images == tuple(pictures[i] for i in mine)
        assert document.texts == tuple(f"sentence {i}" for i in range(number, COUNT, 3))


def test_documents_of_obelics_with_and_without_bytes(
    pictures: list[bytes], tmp_path: Path, write_tar: WriteTar
) -> None:
    urls = [None if n % 2 else f"http://x/{n // 2}" for n in range(8)]
    texts = [f"text {n}" if n % 2 else None for n in range(8)]
    pq.write_table(pa.table({"images": [urls], "texts": [texts]}), tmp_path / "named.parquet")
    structs = [None if url is None else {"bytes": pictures[n // 2], "path": None} for n, url in enumerate(urls)]
    pq.write_table(pa.table({"images": [structs], "texts": [texts]}), tmp_path / "whole.parquet")
    shards = images_in_tars_by_url(tmp_path, pictures, write_tar)
    for name, images in (("named", shards), ("whole", "")):
        config = PrepareConfig(str(tmp_path / f"{name}.parquet"), tmp_path / name, images=images, vocab_size=300)
        document = prepare(config).source.document(0, key(0, 0))
        assert document.images == tuple(pictures[:4])
        assert [type(part).__name__ for part in document.parts] == ["Image", "Text"] * 4


def test_documents_as_pairs(pictures: list[bytes], tmp_path: Path, write_tar: WriteTar) -> None:
    images_loose(tmp_path, pictures, write_tar)
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, mmc4(COUNT))))
    found = prepare(PrepareConfig(str(tmp_path / "docs.jsonl"), tmp_path / "out", vocab_size=300, as_pairs=True)).source
    drawn = set()
    for position in range(60):
        document = found.document(0, key(0, position))
        (image,), (text,) = document.images, document.texts
        assert text == f"sentence {pictures.index(image)}"
        drawn.add(text)
    assert drawn == {f"sentence {i}" for i in (0, 3, 6, 9)}


def prepared(source: Path, out: Path, **settings: Any) -> Prepared:
    return prepare(PrepareConfig(str(source), out, vocab_size=300, **settings))


def test_what_cannot_be_read_is_one_sentence(pictures: list[bytes], tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"caption": TEXTS})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "dict")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "no_header.csv").write_text("a,a\n1,2\n")
    (tmp_path / "open.csv").write_text('path,caption\na.png,"never closed\n' + "x" * 100)
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "gone.csv").write_text("path,caption\nnowhere.png,words\n../secret.png,words\n")
    (tmp_path / "secret.png").write_bytes(pictures[0])
    cases = [
        ("dict", r"holds several splits \(test, train\)"),
        ("damaged.parquet", r"damaged\.parquet' is truncated or damaged"),
        ("no_header.csv", r"first row of .* is no header"),
        ("numbers.parquet", r"hold no image: .*--image"),
        ("gone.csv", r"no image of the samples .* can be found .*--images"),
    ]
    for name, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            prepared(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_path_that_leads_out_of_the_folder_is_not_followed(pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(pictures[0])
    (tmp_path / "in" / "fine.png").write_bytes(pictures[1])
    names = ["../secret.png", str(tmp_path / "secret.png"), "fine.png", "a/../../secret.png", "", "x\0y.png"]
    rows = [{"image": name, "text": "words"} for name in names]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepared(tmp_path / "in", tmp_path / "out").source
    assert isinstance(found, Pairs)
    assert len(found) == 5  # an empty name is no image
    for i in range(len(found)):
        if i == 2:
            assert found.image(i) == pictures[1]
        else:
            with pytest.raises(BrokenSample, match="there is no image"):
                found.image(i)
    outside = prepared(tmp_path / "in", tmp_path / "out", images="/").source
    assert isinstance(outside, Pairs)
    assert outside.image(1) == pictures[0]  # where the user names a folder that holds it
