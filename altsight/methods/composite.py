"""Composite: A + w * B on one encoder, for any methods A and B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig, from_dict, merge, to_dict
from altsight.core.errors import UserError
from altsight.core.rng import Key, key
from altsight.core.types import Batch, Document, Example, Outputs, Progress
from altsight.data.loader import Prepare
from altsight.data.shapes import Shapes
from altsight.data.views import Crop, remember_views
from altsight.methods import find
from altsight.methods.base import Corpus, Method, check_encoder
from altsight.methods.mug import MUG
from altsight.nn.encoder import Encoded, Encoder

SHARED = ("image", "keep", "visible")
"""Fields that say what the encoder sees; where parts agree on them they are stored once, and encoded once."""
PROBES = 8
"""Made-up documents on which parts are compared."""


@dataclass(frozen=True)
class Part:
    """One method of several. settings: what differs from the method's own defaults, as nested tables."""

    name: str
    weight: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompositePrepare:
    """Document -> the fields of all parts. A field is stored under its own name where all parts agree on it, under
    "a+b/field" where the parts a and b do. None where it is of no use to one of the parts.

    groups: field -> the groups of parts that agree on it, for every field of `SHARED`.
    """

    names: tuple[str, ...]
    prepares: tuple[Prepare, ...]
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]

    def __call__(self, document: Document, at: Key) -> Example | None:
        with remember_views():
            made = [prepare(document, at) for prepare in self.prepares]
        stored: Example = {}
        for part, example in zip(self.names, made, strict=True):
            if example is None:
                return None
            for field_name, value in example.items():
                place = self._place(part, field_name)
                first = stored.setdefault(place, value)
                assert first is value or torch.equal(first, value), f"parts agreed on '{place}' before"
        return stored

    def _place(self, part: str, field_name: str) -> str:
        """Return the name under which a field of a part is stored."""
        group = next((g for g in dict(self.groups).get(field_name, ()) if part in g), (part,))
        return field_name if len(group) == len(self.names) else f"{'+'.join(group)}/{field_name}"


class Composite(Method):
    """The weighted sum of several methods' losses, on one encoder and the same samples.

    Every part starts, prepares and computes as it would alone, under the same keys: a single part with weight 1 is the
    part itself. Where parts give the encoder the same image and the same visible patches it runs once for them. The
    optimizer is one for all: MUG's by default, whatever the parts' sources have. What one part exempts from weight
    decay is exempt. Texts, and the encoder that is evaluated, are those of the first part that has any.

    Not from a paper: the sum is the common denominator of SLIP (CLIP + SimCLR), CoCa and others.
    """

    @dataclass(frozen=True)
    class Config:
        """The parts; the default is MUG with CLIP's loss beside it. Set others in a recipe or a study's plan."""

        parts: tuple[Part, ...] = (Part("mug"), Part("clip", 0.1))

    optim: ClassVar[OptimConfig] = MUG.optim

    def __init__(self, config: Composite.Config, encoder: Encoder, corpus: Corpus) -> None:
        super().__init__(encoder)
        self.config = config
        _check(config.parts)
        made = {part.name: _build(part, encoder, corpus) for part in config.parts}
        self.parts = nn.ModuleDict(made)
        self.losses: dict[str, set[str]] = {name: set() for name in made}
        """The names of the losses that each part has had, for their weights."""
        every = list(made.values())
        for flag, over in (("masked", any), ("shares", any), ("drops_patches", all)):
            setattr(self, flag, over(getattr(part, flag) for part in every))
        self.least_batch = max(part.least_batch for part in every)  # type: ignore[misc]  # that of these very parts
        self.feature_point = every[0].feature_point  # type: ignore[misc]
        self.dual = next((name for name, part in made.items() if part.text is not None), None)
        if self.dual is not None:
            _refer(self, "text", made[self.dual].text)

    def _each(self) -> Iterator[tuple[str, Method]]:
        for name, part in self.parts.items():
            yield name, cast(Method, part)

    def init_weights(self, at: Key) -> None:
        """Set every parameter and buffer from `at`, those of each part as they would be without the others."""
        for _, part in self._each():
            part.init_weights(at)

    @property
    def evaluated(self) -> Encoder:
        """What the first part has evaluated: the encoder, or its teacher."""
        return next(part.evaluated for _, part in self._each())

    def embed_image(self, encoded: Encoded) -> Tensor:
        """Return the image vectors (B, E) of the first part that is a dual encoder; the features where none is."""
        if self.dual is None:
            return super().embed_image(encoded)
        return cast(Method, self.parts[self.dual]).embed_image(encoded)

    def similarity(self) -> tuple[float, float]:
        """Return scale and bias of the first part that is a dual encoder."""
        return super().similarity() if self.dual is None else cast(Method, self.parts[self.dual]).similarity()

    def prepare(self, crop: Crop, size: int) -> CompositePrepare:
        """Return the preparations of all parts as one."""
        prepares = {name: part.prepare(crop, size) for name, part in self._each()}
        return CompositePrepare(tuple(prepares), tuple(prepares.values()), agreement(prepares))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the denominators of all parts."""
        found: dict[str, Tensor] = {}
        for name, part in self._each():
            counts = part.counts(_part_of(batch, name))
            self.losses[name] |= counts.keys()
            found |= _prefixed(name, counts)
        return found

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Compute all parts on one micro-batch; what is encoded from the same tensors is encoded once."""
        out = Outputs()
        with self.encoder.once():
            for name, part in self._each():
                made = part.embed(_part_of(batch, name), at)
                out.shared |= _prefixed(name, made.shared)
                out.local |= _prefixed(name, made.local)
        return out

    def loss(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shares of the losses of all parts over the global batch."""
        losses: dict[str, Tensor] = {}
        for name, part in self._each():
            own = {n.removeprefix(f"{name}/"): rows for n, rows in shared.items() if n.startswith(f"{name}/")}
            if own:
                found = part.loss(own)
                self.losses[name] |= found.keys()
                losses |= _prefixed(name, found)
        return losses

    def weights(self) -> dict[str, float]:
        """Return the weights of the losses that there were, each times its part's."""
        found = {}
        for part in self.config.parts:
            method = cast(Method, self.parts[part.name])
            own = method.weights()
            for name in own.keys() | self.losses[part.name]:
                found[f"{part.name}/{name}"] = part.weight * own.get(name, 1.0)
        return found

    def no_weight_decay(self) -> set[str]:
        """Return what any part exempts."""
        return {_place(name, own) for name, part in self._each() for own in part.no_weight_decay()}

    def lr_scales(self) -> dict[str, float]:
        """Return the factors of all parts."""
        return {_place(name, own): scale for name, part in self._each() for own, scale in part.lr_scales().items()}

    def constant_lr(self) -> tuple[str, ...]:
        """Return the constant rates of all parts."""
        return tuple(_place(name, own) for name, part in self._each() for own in part.constant_lr())

    def start_step(self, at: Progress) -> None:
        """Let every part set what depends on how far the run is."""
        for _, part in self._each():
            part.start_step(at)

    def after_step(self, at: Progress) -> None:
        """Let every part do what follows a step."""
        for _, part in self._each():
            part.after_step(at)

    def report(self) -> dict[str, float]:
        """Return the scalars of all parts."""
        return {n: value for name, part in self._each() for n, value in _prefixed(name, part.report()).items()}


def agreement(prepares: Mapping[str, Prepare]) -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
    """Return, for every field of `SHARED`, the groups of parts whose preparations yield the same.

    They are compared on made-up documents; what depends on a key is the same on all of them only where the same key is
    used in the same way. `CompositePrepare` checks it on every sample.
    """
    source = Shapes(PROBES)
    made: dict[str, list[Example | None]] = {}
    for name, prepare in prepares.items():
        made[name] = [prepare(source.document(i, key(0, i)), key(0, i)) for i in range(PROBES)]
    return tuple((name, _groups(name, made)) for name in SHARED)


def _groups(field_name: str, made: Mapping[str, Sequence[Example | None]]) -> tuple[tuple[str, ...], ...]:
    values = {part: [(example or {}).get(field_name) for example in examples] for part, examples in made.items()}
    groups: list[tuple[str, ...]] = []
    for part, own in values.items():
        place = next((n for n, g in enumerate(groups) if all(map(_same, own, values[g[0]]))), len(groups))
        groups[place : place + 1] = [(*groups[place], part) if place < len(groups) else (part,)]
    return tuple(groups)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _part_of(batch: Batch, part: str) -> Batch:
    """Return the batch as the part called `part` would have it alone: the same tensors, under its own names."""
    tensors = {}
    for name, tensor in batch.tensors.items():
        owners, _, own = name.rpartition("/")
        if not owners or part in owners.split("+"):
            tensors[own] = tensor
    return Batch(tensors, batch.positions, batch.samples, batch.bad)


def _prefixed(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}/{name}": value for name, value in values.items()}


def _place(part: str, parameter: str) -> str:
    """Return what a parameter of a part is called among all."""
    return parameter if parameter.startswith("encoder") else f"parts.{part}.{parameter}"


def _build(part: Part, encoder: Encoder, corpus: Corpus) -> Method:
    """Build one part around the shared encoder, which is the composite's to register."""
    cls = find(part.name)
    check_encoder(part.name, cls, encoder)
    kind: Any = cls.Config
    config = from_dict(merge(to_dict(kind()), part.settings), kind, f"method.parts.{part.name}.settings")
    made = cls(config, encoder, corpus)  # type: ignore[call-arg]
    del made.encoder
    _refer(made, "encoder", encoder)
    return made


def _refer(module: nn.Module, name: str, other: Any) -> None:
    """Set an attribute without registering it: a parameter that is listed twice would be averaged twice by EMA."""
    module.__dict__[name] = other


def _check(parts: Sequence[Part]) -> None:
    names = [part.name for part in parts]
    if not names:
        raise UserError("a composite of no methods computes nothing: name one or more in method.parts.")
    if len(set(names)) < len(names):
        raise UserError(f"method.parts names a method twice ({', '.join(names)}): name each once.")
    if "composite" in names:
        raise UserError("a composite cannot be part of a composite: name its parts in method.parts instead.")
