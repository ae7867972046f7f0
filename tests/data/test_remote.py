"""Data behind S3 and HTTP are the same batches as on disk, read in large ranges, whatever the servers do meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data import files
from altsight.data.cache import Cache
from altsight.data.loader import Loader
from altsight.data.order import BLOCK
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.sources import Source
from tests.data.conftest import Picture, WriteShards
from tests.data.servers import KEYS, WebServer, s3_client, s3_server, web_server
from tests.data.test_loader import CropMaskText, assert_same

SIZE, BATCH = 300, 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Path:
    return write_shards(tmp_path_factory.mktemp("remote") / "data", SIZE, 110)


@pytest.fixture(scope="module")
def s3(shards: Path) -> Iterator[Any]:
    """A client of a real S3 server that holds the shards in the bucket `corpus`."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as address:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        client = s3_client(address)
        client.create_bucket(Bucket="corpus")
        yield client
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3: Any, shards: Path) -> Any:
    """The bucket as it was filled at first."""
    for path in sorted(shards.iterdir()):
        s3.upload_file(str(path), "corpus", f"data/{path.name}")
    return s3


@pytest.fixture
def web(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    for name, value in {"TIMEOUT": "1", "FIRST_WAIT": "0.01", "LONGEST_WAIT": "0.05", "ATTEMPTS": "4"}.items():
        monkeypatch.setenv(f"ALTSIGHT_READ_{name}", value)
    with web_server() as server:
        server.files = {f"/data/{path.name}": path.read_bytes() for path in shards.iterdir()}
        yield server


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return prepare(PrepareConfig(str(shards), tmp_path_factory.mktemp("local") / "out", vocab_size=300)).source


def remote(source: str, tmp_path: Path) -> Source:
    return prepare(PrepareConfig(source, tmp_path / "out", vocab_size=300)).source


def batches(source: Source, workers: int = 0, samples: int = 2 * SIZE) -> list[Batch]:
    loader = Loader(source, source.order(1), CropMaskText(), BATCH, workers)
    return [batch for batch, _ in loader.batches(World(), 0, samples)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_s3_gives_the_batches_of_the_disk(
    bucket: Any, local: Source, tmp_path: Path, workers: int, cached: bool
) -> None:
    source = remote("s3://corpus/data", tmp_path).cached(Cache(tmp_path / "cache", 10**8) if cached else None)
    assert len(source) == SIZE
    # Two passes with the cache, a part of one without: each sample is a request of its own then.
    assert_same(batches(source, workers, 2 * SIZE if cached else 60), batches(local)[: 30 if cached else 3])


def test_blocks_are_read_once_and_whole(bucket: Any, tmp_path: Path) -> None:
    source = remote("s3://corpus/data/*.tar", tmp_path).cached(Cache(tmp_path / "cache", 10**8))
    files.forget()
    batches(source, samples=3 * SIZE)
    used = sum(int(row["size"]) for row in source.index.rows)  # type: ignore[attr-defined]
    assert used <= files.TRAFFIC.bytes <= 1.02 * used
    # Shards of 110, 110 and 80 samples in blocks of 128 of the whole: five pieces.
    pieces = {(i // BLOCK, i // 110) for i in range(SIZE)}
    assert files.TRAFFIC.requests == len(pieces) == 5


def test_an_object_that_changed_is_noticed_sample_by_sample(
    bucket: Any, shards: Path, local: Source, tmp_path: Path
) -> None:
    source = remote("s3://corpus/data", tmp_path).cached(Cache(tmp_path / "cache", 10**8))
    at = int(source.name(115).rpartition("#")[2])
    data = bytearray((shards / "00001.tar").read_bytes())
    data[at + 600] ^= 255
    bucket.put_object(Bucket="corpus", Key="data/00001.tar", Body=bytes(data))
    changed, whole = batches(source), batches(local)
    bad = [name for batch in changed for name in batch.bad]
    assert bad and all("00001.tar#" in name and "not those that were indexed" in name for name in bad)
    for ours, theirs in zip(changed, whole, strict=True):
        same = theirs.samples != 115
        assert (ours.samples[same] == theirs.samples[same]).all()
        assert 115 not in ours.samples.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_object_that_is_gone_names_itself_in_one_line(bucket: Any, tmp_path: Path, workers: int) -> None:
    source = remote("s3://corpus/data", tmp_path)
    bucket.delete_object(Bucket="corpus", Key="data/00002.tar")
    with pytest.raises(UserError, match=r"s3://corpus/data/00002\.tar.*altsight prepare") as caught:
        batches(source.cached(Cache(tmp_path / "cache", 10**8)), workers)
    assert "\n" not in str(caught.value)


def test_parquet_in_s3_is_read_by_row_groups(s3: Any, picture: Picture, tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(40)]
    table = pa.table({"image": pictures, "caption": [f"thing {i}" for i in range(40)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    s3.upload_file(str(tmp_path / "x.parquet"), "corpus", "parquet/x.parquet")
    source = remote("s3://corpus/parquet", tmp_path).cached(Cache(tmp_path / "cache", 10**8))
    assert [source.document(i, key(0, i)).images[0] for i in range(40)] == pictures
    files.forget()
    for i in range(0, 40, 3):
        source.document(i, key(0, i))
    assert files.TRAFFIC.requests == 0  # all four groups are in the cache


FAULTS = ["503", "stall", "slow", "break", "short", "drop", "garbage"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_now_and_then_changes_nothing(
    web: WebServer, local: Source, tmp_path: Path, fault: str
) -> None:
    source = remote(f"{web.url}/data/{{00000..00002}}.tar", tmp_path).cached(Cache(tmp_path / "cache", 10**8))
    for name in web.files:
        web.fail(name, fault, "", fault)
    assert_same(batches(source, samples=SIZE), batches(local, samples=SIZE))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_always_fails_stops_the_run_with_its_shard(web: WebServer, tmp_path: Path, workers: int) -> None:
    source = remote(f"{web.url}/data/{{00000..00002}}.tar", tmp_path)
    web.fail("/data/00001.tar", "503", always=True)
    with pytest.raises(UserError, match=r"/data/00001\.tar.* 4 attempts") as caught:
        batches(source, workers)
    assert "\n" not in str(caught.value)


def test_a_server_that_knows_no_ranges_is_refused_at_once(web: WebServer, tmp_path: Path) -> None:
    web.fail("/data/00001.tar", "whole", always=True)
    with pytest.raises(UserError, match=r"/data/00001\.tar' yields whole files only"):
        remote(f"{web.url}/data/00001.tar", tmp_path)


def test_documents_with_images_on_the_web(web: WebServer, picture: Picture, tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(3)]
    web.files |= {f"/img/{i}.png": data for i, data in enumerate(pictures)}
    info = [{"image_name": f"{i}.png", "matched_text_index": i} for i in range(4)]
    (tmp_path / "d.jsonl").write_text(json.dumps({"text_list": list("abcd"), "image_info": info}))
    config = PrepareConfig(str(tmp_path / "d.jsonl"), tmp_path / "out", vocab_size=300, images=f"{web.url}/img/")
    assert prepare(config).source.document(0, key(0, 0)).images == tuple(pictures)
