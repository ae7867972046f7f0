"""`altsight mix`: prepared folders -> one data set that draws from all of them by weight."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from altsight.core.errors import UserError
from altsight.data.folder import appears_whole, check_out, writing
from altsight.data.mixture import Mixture
from altsight.data.prepared import (
    DATASET,
    TOKENIZER,
    WRITTEN,
    Contents,
    Prepared,
    mixture_digest,
    open_prepared,
    write_contents,
)
from altsight.data.survey import Progress, Survey, silent
from altsight.data.text import load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class MixConfig:
    """What `altsight mix` reads and writes."""

    sources: Positional[tuple[Path, ...]]
    """Folders that `altsight prepare` wrote: pairs and documents, as many as you like."""
    out: Path
    """The folder to write; a mixture that is there already is replaced."""
    weights: tuple[float, ...] = ()
    """Share of the samples of a run that each source gives, of any scale; empty: by their number of samples."""
    tokenizer: str = ""
    """A tokenizer.json file or a Hugging Face name; empty: one is trained on the texts of all sources."""
    vocab_size: int = 8192
    """Size of the trained tokenizer."""


def mix(config: MixConfig, progress: Progress = silent) -> Prepared:
    """Write a data set that draws from several others; the mixture is part of the order, exact and resumable.

    Raises:
        UserError: a source was not prepared, or the weights do not fit.
    """
    check_out(config.out, DATASET, WRITTEN)
    parts = [open_prepared(source) for source in config.sources]
    weights = tuple(map(float, config.weights or (len(part.source) for part in parts)))
    if not parts or len(set(config.sources)) < len(parts):
        raise UserError("a mixture takes two or more prepared folders, each once: name them.")
    if len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"{len(parts)} sources take {len(parts)} weights above 0: --weights {weights} does not fit.")
    for source, part in zip(config.sources, parts, strict=True):
        if isinstance(part.source, Mixture):
            raise UserError(f"'{source}' is itself a mixture: name the folders that it draws from instead.")
    classes = tuple(sorted({name for part in parts for name in part.classes}))
    mixture = Mixture(tuple(part.source for part in parts), weights, classes)
    survey = Survey(mixture, progress)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if tokenizer is None and any(part.tokenizer for part in parts):
        tokenizer = train_tokenizer(survey.texts(), config.vocab_size)
    counted = ("samples", "with_caption", "captions", "left_out")
    statistics = {name: sum(part.statistics[name] for part in parts) for name in counted}
    target = config.out.resolve()
    contents = Contents(
        kind="mixture",
        digest=mixture_digest(parts, weights),
        statistics=statistics | survey.statistics(tokenizer),
        tokenizer=tokenizer is not None,
        classes=classes,
        # Relative, so that folders which lie side by side can be moved together.
        mixture={
            os.path.relpath(source.resolve(), target): weight
            for source, weight in zip(config.sources, weights, strict=True)
        },
    )
    with appears_whole(config.out) as folder, writing(config.out):
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
        write_contents(folder, contents)
    return open_prepared(config.out)
