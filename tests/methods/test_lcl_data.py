"""LCL: documents and pairs as sequences, what it refuses, and learning from real documents."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import altsight_samples
import pytest
import torch

from altsight.core.config import OptimConfig
from altsight.core.dist import World
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.loader import Loader
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared
from altsight.data.sequence import Markers
from altsight.data.sources import Interleaves
from altsight.data.views import Crop
from altsight.methods.base import Corpus, Samples
from altsight.methods.lcl import LCL
from altsight.methods.sequences import SequencePrepare
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.interleaved import LanguageConfig
from altsight.train.accumulate import Accumulator, Embed
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig
from tests.contract.tiny import tiny_run
from tests.methods.made_documents import (
    CONFIG,
    DOCUMENTS,
    WIDTH,
    build,
    document,
    picture,
    words,
)


@pytest.fixture
def method(encoder: Encoder, corpus: Corpus) -> LCL:
    return build(encoder, corpus)


def test_a_document_is_one_sequence_with_its_pictures(method: LCL, corpus: Corpus) -> None:
    prepare_, at = method.prepare(Crop(), 32), key(0, 5)
    example = pickle.loads(pickle.dumps(prepare_))(document("two dogs", 1, "a sofa", 2), at)
    assert example is not None
    tokenizer, picture_ids = corpus.need_tokenizer("tests"), method.markers.picture(16)
    used = [tokenizer.start, *words(corpus, "two dogs"), *picture_ids, *words(corpus, "a sofa"), *picture_ids]
    used.append(tokenizer.end)
    assert example["text"].tolist() == used + [tokenizer.pad] * (80 - len(used))
    assert (example["length"].item(), example["images"].item()) == (len(used), 2)
    assert example["image"].shape == (3, 3, 32, 32) and example["image"].dtype == torch.uint8
    assert not example["image"][2].any()
    again = prepare_(document("two dogs", 1, "a sofa", 1), at)
    assert again is not None and not torch.equal(again["image"][0], again["image"][1])  # a crop for each picture


def test_pictures_beyond_the_most_and_broken_ones_are_left_out(method: LCL) -> None:
    prepare_ = method.prepare(Crop(), 32)

    def count(*parts: str | int | bytes) -> tuple[int, int] | None:
        example = prepare_(document(*parts), key(0, 0))
        if example is None:
            return None
        starts = int((example["text"] == method.markers.start_of_image).sum())
        assert bool(example["image"][:starts].flatten(1).any(dim=1).all()) and not example["image"][starts:].any()
        return starts, int(example["images"])

    assert count("a", 1, "b", 2, 3, 4, "c") == (3, 3)
    assert count("a", 1, b"no image", 2, 3, "c") == (2, 2)  # the first three, of which one is broken
    assert count("a", b"no image", "b", 1) == (1, 1)
    assert count("a", b"no image") is None
    # 80 tokens have room for four pictures of 18, but not with this much text before the second one.
    assert count("a", 1, "a red house by the sea " * 9, 2) == (1, 1)
    assert count("a red house by the sea " * 12, 1) is None
    assert prepare_(document(1, 2), key(0, 0)) is None and prepare_(document("a"), key(0, 0)) is None


def test_a_pair_is_cut_like_that_of_every_other_method_and_stands_on_either_side(
    encoder: Encoder, corpus: Corpus
) -> None:
    method = build(encoder, corpus, "pairs")
    prepare_, first = method.prepare(Crop(), 32), 0
    for position in range(200):
        at = key(0, position)
        example = prepare_(document(1, "two dogs"), at)
        assert example is not None and example["image"].shape == (1, 3, 32, 32)
        assert position or torch.equal(example["image"][0], Crop()(picture(1), 32, at))
        first += int(example["text"][0] == method.markers.start_of_image)
    assert 75 < first < 125
    assert prepare_(document(1), key(0, 0)) is None


@pytest.mark.parametrize(
    ("samples", "data", "parts", "pair"),
    [
        ("pairs", "auto", (1, "a"), True),
        ("documents", "auto", (1, "a"), False),
        ("mixed", "auto", (1, "a"), True),
        ("mixed", "auto", ("a", 1), False),
        ("mixed", "auto", (1, "a", 2), False),
        ("mixed", "interleaved", (1, "a"), True),
        ("unknown", "auto", (1, "a"), True),
        ("unknown", "auto", (1, "a", "b"), False),
        ("unknown", "paired", (1, "a", 2, "b"), True),
    ],
)
def test_every_sample_is_read_as_what_it_is(
    encoder: Encoder, corpus: Corpus, samples: Samples, data: Any, parts: tuple[str | int, ...], pair: bool
) -> None:
    method = build(encoder, corpus, samples, data=data)
    prepare_ = method.prepare(Crop(), 32)
    starts = set()
    for position in range(20):
        example = prepare_(document(*parts), key(0, position))
        assert example is not None
        starts.add(int(example["text"][0]))
    both = {method.tokenizer.start, method.markers.start_of_image}
    assert starts == (both if pair else {method.tokenizer.start})
    only_pairs = samples == "pairs" or data == "paired"
    assert example["image"].shape[0] == (1 if only_pairs else 3)


@pytest.mark.parametrize("spectrum", [False, True])
def test_small_pictures_of_a_curriculum_have_fewer_tokens(method: LCL, spectrum: bool) -> None:
    made = method.prepare(Crop(), 16)
    assert isinstance(made, SequencePrepare)
    if spectrum:  # full-size pictures, of which the encoder takes the low frequencies
        made = dataclasses.replace(made, size=32)
        method.encoder.input_size = 16
    example = made(DOCUMENTS[0], key(0, 0))
    assert example is not None
    batch = Batch({name: value[None] for name, value in example.items()}, torch.arange(1), torch.arange(1))
    assert int((batch["text"] == method.markers.image).sum()) == 2 * 4
    assert method.embed(batch, key(0, 0)).shared["image"].shape == (2, WIDTH)


# Errors.


def test_documents_are_asked_for_and_pairs_given(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="needs documents, and the data set has only image-text pairs"):
        build(encoder, corpus, "pairs", data="interleaved")
    for samples in ("documents", "mixed"):
        with pytest.raises(UserError, match="needs image-text pairs, and the data set has interleaved documents"):
            build(encoder, corpus, samples, data="paired")
    for samples in ("documents", "mixed", "unknown"):
        build(encoder, corpus, samples, data="interleaved")


def test_pairs_are_refused_before_the_first_step(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("lcl", sample_data.directory, 64)
    run = dataclasses.replace(run, method=dataclasses.replace(run.method, data="interleaved"))
    with pytest.raises(UserError, match="prepare documents"):
        pretrain(run, sample_data, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_what_does_not_fit_is_refused(encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"--method.sequence 20 or more"):
        build(encoder, corpus, sequence=19)
    build(encoder, corpus, sequence=20)
    with pytest.raises(UserError, match="not divisible by its 3 heads"):
        build(encoder, corpus, language=LanguageConfig(32, 3, 1))
    with pytest.raises(UserError, match="lcl learns from text"):
        LCL(CONFIG, encoder, Corpus())


# Real documents.


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The embedded interleaved documents."""
    out = tmp_path_factory.mktemp("documents") / "out"
    return prepare(PrepareConfig(str(altsight_samples.documents()), out, vocab_size=1024))


def test_the_corpus_knows_what_its_samples_are(documents: Prepared, sample_data: Prepared) -> None:
    source = documents.source
    assert isinstance(source, Interleaves)
    as_pairs = dataclasses.replace(source, as_pairs=True)

    def kind(*sources: Any) -> Samples:
        mixed = sources[0] if len(sources) == 1 else Mixture(sources, (1.0,) * len(sources))
        return Corpus.of(dataclasses.replace(documents, source=mixed)).samples

    assert kind(source) == kind(source, source) == "documents"
    assert kind(sample_data.source) == kind(as_pairs) == kind(as_pairs, sample_data.source) == "pairs"
    assert kind(source, sample_data.source) == kind(source, as_pairs) == "mixed"
    corpus = Corpus.of(sample_data)
    assert (corpus.tokenizer, corpus.classes) == (sample_data.tokenizer, sample_data.classes)


def test_learns_from_real_documents(documents: Prepared, tmp_path: Path) -> None:
    run = Run(
        name="lcl",
        method=LCL.Config(LanguageConfig(32, 2, 1), data="interleaved", sequence=400),
        optim=OptimConfig(lr=3e-3, lr_base_batch=0, warmup_fraction=0.1),
        encoder=EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2),
        # One document in five has its first picture behind so many tokens.
        data=DataConfig(str(documents.directory), Crop(scale=(0.9, 1.0), flip=False), workers=0, max_bad_fraction=0.5),
        train=TrainConfig(samples=8 * 30, batch=8, precision="fp32", device="cpu", log_every=1),
    )
    pretrain(run, documents, tmp_path)
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    for name in ("generation", "contrastive"):
        values = [line[f"loss/{name}"] for line in lines]
        start, end = sum(values[:5]) / 5, sum(values[-5:]) / 5
        assert end < 0.97 * start, f"{name} went from {start:.3f} to {end:.3f}"


def test_pairs_and_documents_in_one_run(documents: Prepared, sample_data: Prepared) -> None:
    source = Mixture((sample_data.source, documents.source), (1.0, 1.0), sample_data.classes)
    mixed = dataclasses.replace(documents, source=source)
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=1, heads=2))
    method = build(encoder, Corpus.of(mixed), "mixed", sequence=1024)
    loader = Loader(source, source.order(0), method.prepare(Crop(), 32), 16)
    batch, _ = next(loader.batches(World(), 0, 16))
    assert batch["image"].shape == (16, 3, 3, 32, 32)
    kinds = [source.locate(i)[0] is documents.source for i in batch.samples.tolist()]
    assert 0 < sum(kinds) < 16
    for whole, row, length in zip(kinds, batch["text"].tolist(), batch["length"].tolist(), strict=True):
        last = row[length - 1]
        if whole:
            assert (row[0], last) == (method.tokenizer.start, method.tokenizer.end)
        else:
            assert (row[0] == method.tokenizer.start) is (last == method.markers.end_of_image)
    losses, _ = Accumulator(method, Embed(method), 0)(batch)
    assert all(math.isfinite(float(loss)) for loss in losses.values())


def test_markers_are_behind_the_vocabulary(method: LCL, corpus: Corpus) -> None:
    tokenizer = corpus.need_tokenizer("tests")
    assert method.markers == Markers.after(tokenizer)
    assert method.language.token_embedding.num_embeddings == tokenizer.vocab_size + 3
    assert method.head is not None and method.head.map.out_features == tokenizer.vocab_size + 3
