"""What is done with data before a run: `prepare`, `mix`, `check`, `codebook`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from altsight.data.check import check as check_data
from altsight.data.mix import MixConfig
from altsight.data.mix import mix as mix_data
from altsight.data.mixture import Mixture
from altsight.data.prepare import PrepareConfig
from altsight.data.prepare import prepare as prepare_data
from altsight.data.prepared import Prepared, open_prepared
from altsight.data.sheet import write_sheet
from altsight.data.show import show
from altsight.study.plan import locate
from altsight.train.codebook import CodebookConfig, make_codebook
from altsight.train.log import console, progress_bar


def prepare(argv: Sequence[str]) -> int:
    """`altsight prepare SOURCE --out DIR`."""
    about = "Index a corpus for training: where every sample lies, statistics, a tokenizer. Nothing is copied."
    options = tyro.cli(PrepareConfig, args=argv, prog="altsight prepare", description=about)
    options = replace(options, source=locate(options.source), images=locate(options.images))
    try:
        with progress_bar() as bar:
            prepared = prepare_data(options, partial(draw, bar))
    except KeyboardInterrupt:
        print("altsight: stopped; run the same command again to go on with the shards that are left.", file=sys.stderr)
        return 130
    _say_prepared(prepared)
    return 0


def mix(argv: Sequence[str]) -> int:
    """`altsight mix DIR DIR ... --out DIR`."""
    about = "Make one data set of several prepared ones, from which a run draws by weight."
    options = tyro.cli(MixConfig, args=argv, prog="altsight mix", description=about)
    with progress_bar() as bar:
        prepared = mix_data(options, partial(draw, bar))
    _say_prepared(prepared)
    return 0


def _say_prepared(prepared: Prepared) -> None:
    counted, parts = prepared.statistics, prepared.source.parts()
    left_out = f", {counted['left_out']:,} records without an image left out" if counted["left_out"] else ""
    texts = f", {counted['captions']:,} texts" if counted["captions"] else ""
    where = f"{len(parts):,} {'source' if isinstance(prepared.source, Mixture) else 'shard'}{'s' * (len(parts) > 1)}"
    console.print(f"{len(prepared.source):,} samples in {where}{texts}{left_out} -> {prepared.directory}")


def draw(bar: Progress, what: str, done: int, total: int) -> None:
    """Move the task called `what` of a progress bar; it is added when it is first heard of."""
    ids = {task.description: task.id for task in bar.tasks}
    number = ids[what] if what in ids else bar.add_task(what, total=total, note="")
    bar.update(number, completed=done, total=total)


@dataclass(frozen=True)
class Check:
    """Report on prepared data before a run: what is in it, what is wrong with it, how many steps a run will take."""

    data: tyro.conf.Positional[Path]
    """Folder that `altsight prepare` wrote."""
    batch: int = 256
    """Global batch of the run."""
    samples: int = 100_000
    """Samples that the run is to see."""
    context: int = 77
    """Tokens that the text tower of the run reads; longer captions are cut."""
    most: int = 50_000
    """Samples that are looked at, in blocks spread over the data; 0: all."""
    workers: int = os.cpu_count() or 1
    """Processes that decode."""
    sheet: Path | None = None
    """Write a contact sheet of random samples here (.html or .png)."""
    sheet_samples: int = 60
    """Samples on the contact sheet."""
    json: bool = False
    """Print the report as JSON, and nothing else on standard output."""


def check(argv: Sequence[str]) -> int:
    """`altsight check DIR`."""
    options = tyro.cli(Check, args=argv, prog="altsight check")
    prepared = open_prepared(options.data)
    with progress_bar(transient=True) as bar:
        progress = partial(draw, bar)
        if options.sheet is not None:
            write_sheet(prepared, options.sheet, options.sheet_samples, progress=progress)
            console.print(f"contact sheet -> {options.sheet}", highlight=False)
        report = check_data(
            prepared,
            batch=options.batch,
            samples=options.samples,
            workers=options.workers,
            context=options.context,
            most=options.most,
            progress=progress,
        )
    if options.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        show(report, Console())
    return 0


@dataclass(frozen=True)
class Codebook:
    """Make words of pixels of a corpus for BEiT and SplitMask (`--method.tokenizer.path`)."""

    data: tyro.conf.Positional[Path]
    """Folder that `altsight prepare` wrote."""
    out: Path
    """The .safetensors file to write."""
    config: Annotated[CodebookConfig, tyro.conf.arg(name="")] = field(default_factory=CodebookConfig)


def codebook(argv: Sequence[str]) -> int:
    """`altsight codebook DIR --out FILE`."""
    options = tyro.cli(Codebook, args=argv, prog="altsight codebook")
    with progress_bar() as bar:
        used = make_codebook(open_prepared(options.data), options.out, options.config, partial(draw, bar))
    words = options.config.vocabulary
    # A target that is nearly always the same word teaches little (specification 6.2).
    poor = "; try --zero-mean" if used["top_word"] > 0.5 else ""
    console.print(
        f"{words:,} words; the commonest is {used['top_word']:.0%} of the patches{poor}, "
        f"{used['word_bits']:.1f} of {math.log2(words):.1f} bits are used -> {options.out}"
    )
    return 0
