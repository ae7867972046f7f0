"""What a run will cost, before it is started: samples, training FLOPs, GPU-hours, memory of one GPU.

What one sample costs is counted once for every recipe by `python -m bench.recipes` and kept in costs.toml, so that the
list is there at once. The rest is arithmetic with the numbers below.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from altsight.core.config import from_dict
from altsight.core.dist import alone
from altsight.core.rng import key, torch_seeded
from altsight.core.types import Batch, Document, Image, Text
from altsight.data.prepare import read_pairs
from altsight.data.sources import Pairs
from altsight.data.text import Tokenizer, train_tokenizer
from altsight.methods import find
from altsight.methods.base import Corpus, Method, Samples
from altsight.nn.encoder import Encoder
from altsight.study.plan import locate
from altsight.train.account import flops_per_sample
from altsight.train.run import Run, build

FILE = Path(__file__).with_name("costs.toml")
PEAK, UTILISATION = 989e12, 0.4
FEW, MORE = 2, 4
"""Samples of the two forward passes whose saved tensors are compared."""
DOCUMENT_TOKENS, DOCUMENT_IMAGES = 425, 4
"""What a document is taken to hold. MMC4 has 43 B tokens and 571 M images in 101.2 M documents, 425 and 5.6 in each;
that images which do not agree with their sentence are left out takes it to 4 by a guess."""
PRETRAINED = ("locked", "text_model", "language_model")
"""Settings of methods that name weights to start from; their sizes stand beside them."""
ONE_MOMENT = ("sgd", "momentum", "lars", "lion")
"""Optimizers that keep one number a parameter; the others are taken to keep two."""


@dataclass(frozen=True)
class Cost:
    """What one sample costs, and what a GPU has to hold.

    flops: of forward and backward of a sample. parameters, trained: of the whole method; a momentum encoder is among
    the first only. state: bytes of weights, gradients and the optimizer's moments. casts: bytes that the graph holds
    under bf16 autocast whatever the batch is, chiefly bf16 copies of the weights. activations: those that it holds for
    each sample.
    """

    flops: float
    parameters: int
    trained: int
    state: int
    casts: int
    activations: int

    def memory(self, samples: float) -> float:
        """Return the bytes that training takes on one GPU that computes `samples` samples of every batch.

        The state is 4 bytes a parameter, and for a trained one 4 for its gradient and 4 for each moment of the
        optimizer (16 together under AdamW). What the global loss gathers, the buffers of communication and what the
        allocator cannot use come on top. Micro-batches take less: the activations of one of them at a time.
        """
        return self.state + self.casts + self.activations * samples


@dataclass(frozen=True)
class Machine:
    """The GPU that estimates are for, and what share of its peak training is taken to reach."""

    peak: float = PEAK
    """FLOPs per second; the default is dense bf16 on one NVIDIA H100 (SXM)."""
    utilisation: float = UTILISATION
    """Share of the peak that training is taken to reach, where it does not wait for data."""

    def hours(self, flops: float) -> float:
        """Return the GPU-hours that `flops` take."""
        return flops / (self.peak * self.utilisation) / 3600


@functools.cache
def stored() -> dict[str, dict[str, Cost]]:
    """Return what costs.toml holds: "recipes" or a study's name -> recipe or arm -> cost."""
    if not FILE.exists():
        return {}
    with FILE.open("rb") as lines:
        groups = tomllib.load(lines)
    return {
        group: {name: from_dict(table, Cost, f"{FILE.name}: {group}.{name}") for name, table in costs.items()}
        for group, costs in groups.items()
    }


def measure(run: Run[Any], kind: str = "pairs", vocabulary: int = 8192, classes: int = 22) -> Cost:
    """Return what one sample of `run` costs, counted on embedded samples on the CPU.

    A ViT is computed at depths 1 and 2 and the result carried on to its own depth: every block costs the same. FLOPs
    are those that a run counts for itself (`altsight.train.account`). kind: pairs, images or documents.
    """
    shown: Samples = "documents" if kind == "documents" else "pairs"
    run = from_scratch(run)
    corpus = Corpus(_tokenizer(vocabulary), tuple(map(str, range(classes))), shown)
    with torch.device("meta"):
        encoder = Encoder(run.encoder)
    if not encoder.is_vit:
        return _counted(run, corpus, kind)
    one, two = (
        _counted(dataclasses.replace(run, encoder=dataclasses.replace(run.encoder, depth=depth)), corpus, kind)
        for depth in (1, 2)
    )
    more = len(encoder.backbone.blocks) - 1
    values = {f.name: getattr(one, f.name) for f in dataclasses.fields(Cost)}
    return Cost(**{name: value + more * (getattr(two, name) - value) for name, value in values.items()})


def from_scratch(run: Run[Any]) -> Run[Any]:
    """Return `run` without the pre-trained parts that it names, so that it can be built without fetching them."""
    named = {f.name: "" for f in dataclasses.fields(run.method) if f.name in PRETRAINED}
    return dataclasses.replace(run, method=dataclasses.replace(run.method, **named))


def _counted(run: Run[Any], corpus: Corpus, kind: str) -> Cost:
    """Count without computing, on tensors that have shapes only; by computing where something depends on values."""
    with torch.device("meta"):
        method: Method = find(run.name)(run.method, Encoder(run.encoder), corpus)  # type: ignore[call-arg]
    try:
        batch = _batch(method, run, kind)
        # Copies of such tensors are warned of, since they have no address.
        with FakeTensorMode(allow_non_fake_inputs=True) as shapes, warnings.catch_warnings(action="ignore"):
            method.to_empty(device="cpu")
            batch.tensors = {name: shapes.from_tensor(tensor) for name, tensor in batch.tensors.items()}
            return _count(method, batch, run)
    except RuntimeError:
        method = build(run, corpus)
        return _count(method, _batch(method, run, kind), run)


def _count(method: Method, batch: Batch, run: Run[Any]) -> Cost:
    few, more = (_saved(method, batch.part(0, n)) for n in (FEW, MORE))
    activations = (more - few) // (MORE - FEW)
    parameters = sum(p.numel() for p in method.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    moments = 1 if run.optim.name in ONE_MOMENT else 2
    return Cost(
        flops=flops_per_sample(method, batch),
        parameters=parameters,
        trained=trained,
        state=4 * parameters + 4 * (1 + moments) * trained,
        casts=few - FEW * activations,
        activations=activations,
    )


def _saved(method: Method, batch: Batch) -> int:
    """Return the bytes of all tensors that the graph of one forward keeps for the backward, parameters left out."""
    own = {p.untyped_storage()._cdata for p in method.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    at = key(0, 0, "account")
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
        torch_seeded(at),
        alone(),
    ):
        out = method.embed(batch, at)
        losses = [*out.local.values(), *(method.loss(out.shared).values() if out.shared else ())]
    del losses  # up to here the graph holds every tensor, so that no address is given out twice
    return sum(kept.values())


def _batch(method: Method, run: Run[Any], kind: str) -> Batch:
    prepared = method.prepare(run.data.crop, run.encoder.img_size)
    examples = []
    for i, document in enumerate(_documents(kind)):
        example = prepared(document, key(0, i, "sample"))
        assert example is not None, f"{run.name} cannot use {document.id}"
        examples.append(example)
    places = torch.arange(MORE)
    return Batch({name: torch.stack([e[name] for e in examples]) for name in examples[0]}, places, places)


def _documents(kind: str) -> list[Document]:
    """Return MORE embedded pairs, with the labels 0 and 1 in turn, or as many documents made of their pictures."""
    source = _pairs()
    pairs = [source.document(i, key(0, i, "document")) for i in range(MORE)]
    if kind != "documents":
        return [Document(pair.parts, pair.id, {"label": i % 2}) for i, pair in enumerate(pairs)]
    pictures = [part for pair in pairs for part in pair.parts if isinstance(part, Image)]
    sentence = Text(" ".join(["a"] * (DOCUMENT_TOKENS // DOCUMENT_IMAGES)))
    parts = tuple(part for picture in pictures[:DOCUMENT_IMAGES] for part in (sentence, picture))
    return [Document(parts, f"document {i}") for i in range(MORE)]


@functools.cache
def _pairs() -> Pairs:
    return read_pairs(locate("samples:clipart/train"), ("{title}",), "label")


@functools.cache
def _tokenizer(vocabulary: int) -> Tokenizer:
    """Return a tokenizer with so many ids, most of which no text needs: what counts is the size of the tables."""
    tokenizer = train_tokenizer((text for i in range(200) for text in _pairs().texts(i)), 300)
    tokenizer.model.add_tokens([f"<unused {i}>" for i in range(vocabulary - tokenizer.vocab_size)])
    return tokenizer
