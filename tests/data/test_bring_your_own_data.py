"""Every command of 'Bring your own data' runs on data in the layout that it speaks of, a real S3 server included."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from altsight import cli
from altsight.data.prepared import open_prepared
from tests.data.conftest import Picture, WriteTar
from tests.data.servers import KEYS, s3_client, s3_server

PAGE = Path(__file__).parents[2] / "docs" / "bring_your_own_data.md"
COUNT = 24
TEXTS = [f"a picture of thing {i}" for i in range(COUNT)]
KINDS = ["cat" if i % 3 else "dog" for i in range(COUNT)]


def commands() -> list[str]:
    """Return the commands of the page, in order."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL))
    return [line for line in blocks.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, picture: Picture, write_tar: WriteTar) -> Path:
    """A folder with every layout that the page names."""
    home = tmp_path_factory.mktemp("corpus")
    pictures = [picture(i, (80, 70)) for i in range(COUNT)]
    names = [f"{i:03d}.png" for i in range(COUNT)]
    write_tars(home, pictures, write_tar)
    write_tables(home, pictures, names)
    write_documents(home, pictures, names, write_tar)
    return home


def write_tars(home: Path, pictures: list[bytes], write_tar: WriteTar) -> None:
    for number in range(2):
        members: dict[str, bytes] = {}
        for i in range(number * 12, number * 12 + 12):
            fields = {"title": TEXTS[i], "tags": ["red", "round"], "kind": KINDS[i]}
            members |= {f"{i:05d}.png": pictures[i], f"{i:05d}.txt": TEXTS[i].encode()}
            members[f"{i:05d}.json"] = json.dumps(fields).encode()
        write_tar(home / "shards" / f"{number:05d}.tar", members)


def write_tables(home: Path, pictures: list[bytes], names: list[str]) -> None:
    import datasets

    (home / "parquet").mkdir()
    structs = [{"bytes": data, "path": name} for data, name in zip(pictures, names, strict=True)]
    table = pa.table({"image": structs, "text": TEXTS, "kind": KINDS})
    pq.write_table(table, home / "parquet" / "train-00000-of-00001.parquet", row_group_size=8)
    datasets.Dataset(table).cast_column("image", datasets.Image()).save_to_disk(home / "saved")
    (home / "photos").mkdir()
    for folder in (home / "photos", home / "flat", *(home / "tree" / kind for kind in set(KINDS))):
        folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(pictures):
        for folder in (home / "photos", home / "flat", home / "tree" / KINDS[i]):
            (folder / names[i]).write_bytes(data)
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (home / "photos" / f"captions.{suffix}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["file_name", "caption", "kind"])
            writer.writerows(zip(names, TEXTS, KINDS, strict=True))
    rows = [{"picture": name, "caption": text} for name, text in zip(names, TEXTS, strict=True)]
    (home / "photos" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    several = [{"image": name, "captions": [text, f"{text}!"]} for name, text in zip(names, TEXTS, strict=True)]
    (home / "photos" / "coco.jsonl").write_text("\n".join(map(json.dumps, several)))


def write_documents(home: Path, pictures: list[bytes], names: list[str], write_tar: WriteTar) -> None:
    members: dict[str, bytes] = {}
    for i, data in enumerate(pictures):
        about = json.dumps({"url": f"http://example.org/{i}"}).encode()
        members |= {f"{i:03d}.png": data, f"{i:03d}.json": about}
        (home / "mmc4" / "images").mkdir(parents=True, exist_ok=True)
        (home / "mmc4" / "images" / names[i]).write_bytes(data)
    write_tar(home / "mmc4" / "tars" / "0.tar", members)
    documents = []
    for start in range(0, COUNT, 3):
        info = [{"image_name": names[start + n], "matched_text_index": n, "matched_sim": 0.3} for n in range(3)]
        documents.append({"text_list": TEXTS[start : start + 3], "image_info": info})
    (home / "mmc4" / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (home / "obelics").mkdir()
    images = [[f"http://example.org/{i}", None] for i in range(COUNT)]
    pq.write_table(pa.table({"images": images, "texts": [[None, t] for t in TEXTS]}), home / "obelics" / "docs.parquet")


@pytest.fixture
def bucket(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tars in a bucket called `corpus` of a real S3 server."""
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="corpus")
        for path in (corpus / "shards").iterdir():
            client.upload_file(str(path), "corpus", f"shards/{path.name}")
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield
        fsspec.filesystem("s3").clear_instance_cache()


def test_every_command_runs(corpus: Path, bucket: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "altsight"
        assert cli.run(arguments) == 0, command
    sizes = {path.parent.name: len(open_prepared(path.parent).source) for path in corpus.glob("*/dataset.json")}
    documents = {"documents": 8, "documents_in_tars": 8, "as_pairs": 8, "obelics_data": 24, "mixed": 32}
    assert sizes == dict.fromkeys(sizes, COUNT) | documents
    assert len(sizes) == sum(" --out " in command for command in commands())
    assert open_prepared(corpus / "tree_data").classes == ("cat", "dog")
    assert (corpus / "sheet.html").stat().st_size > 1000


def test_the_page_has_an_example_for_every_kind_of_source() -> None:
    text = " ".join(commands())
    for word in (
        ".tar",
        ".parquet",
        "saved",
        ".csv",
        ".tsv",
        ".jsonl",
        "tree",
        "flat",
        "mmc4",
        "obelics",
        "mix",
        "s3://",
    ):
        assert word in text, word
