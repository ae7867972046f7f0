"""The report of `altsight check` as a page in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from altsight.data.check import Report
from altsight.data.facts import SHARED_BY
from altsight.data.survey import PERCENTILES

SHOWN = 5
"""Shards, classes and reasons that are named; what is beyond is summed up."""


def show(report: Report, console: Console) -> None:
    """Print how many samples there are, what is in them, what is wrong with them, and what the run will do."""
    console.print(_title(report), "", highlight=False)
    console.print(Columns([Padding(block, (0, 0, 1, 0), expand=False) for block in _blocks(report)], padding=(0, 5)))
    if report.captions.frequent:
        console.print(_block(f"Most frequent {_texts(report)}", report.captions.frequent), "")
    console.print(_percentiles(report), "")
    if report.images.faults:
        console.print(_faults(report), "")
    if report.warnings:
        console.print("[bold]To know before a run[/]")
        for warning in report.warnings:
            console.print(Padding(Text(warning), (0, 0, 0, 2), expand=False))
        console.print()
    console.print(_run(report), highlight=False)


def _title(report: Report) -> Text:
    places = "source" if report.weights else "shard"
    size = f"{report.samples:,} {_samples(report)} in {len(report.shards):,} {places}{'s' * (len(report.shards) > 1)}"
    title = Text.assemble((size, "bold"), f" of {report.directory}")
    if report.is_remote:
        title.append(", read over the network")
    if report.looked_at < report.samples:
        title.append(f"\nCounted on {report.looked_at:,} of them, spread over the data; --most 0 counts on all.")
    return title


def _samples(report: Report) -> str:
    return "documents" if report.kind == "documents" else "samples"


def _texts(report: Report) -> str:
    return "captions" if report.kind == "pairs" else "texts"


def _blocks(report: Report) -> list[Table | Text]:
    """Return the small tables that stand beside each other where there is room."""
    images, captions, samples = report.images, report.captions, _samples(report)
    found = {
        "usable": images.count,
        "broken": images.broken,
        "copies of another": images.copies,
        "look like another": images.lookalikes,
    }
    if report.kind != "pairs":
        found[f"{samples} without any"] = images.unusable
    blocks: list[Table | Text] = [_block("Images", found)]
    if captions.count:
        repeated = {"repeat another": captions.repeated, f"shared by more than {SHARED_BY}": captions.shared}
        counts = {"in all": captions.count, f"{samples} without any": captions.missing}
        blocks.append(_block(_texts(report).capitalize(), counts | {n: f"{s:.1%}" for n, s in repeated.items()}))
    else:
        blocks.append(Text("No text", "bold"))
    if report.classes:
        ranked = dict(sorted(report.classes.items(), key=lambda item: -item[1]))
        blocks.append(_block(f"{len(ranked):,} classes", _first(ranked)))
    if report.weights:
        blocks.append(_sources(report))
    elif len(report.shards) > 1:
        blocks.append(_block("Shards", _first(report.shards)))
    return blocks


def _first(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the first few of `counts` and the sum of the others."""
    names = list(counts)
    if len(names) <= SHOWN + 1:
        return dict(counts)
    rest = names[SHOWN:]
    return {name: counts[name] for name in names[:SHOWN]} | {f"{len(rest):,} more": sum(counts[n] for n in rest)}


def _block(title: str, rows: Mapping[str, int | str]) -> Table:
    table = _table(title)
    table.show_header = False
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=60)
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(_plain(name), value if isinstance(value, str) else f"{value:,}")
    return table


def _plain(text: str) -> Text:
    """Return `text` without what could steer the terminal: captions and names come from anywhere."""
    return Text("".join(c if c.isprintable() else " " for c in text))


def _table(title: str) -> Table:
    return Table(box=None, title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False)


def _sources(report: Report) -> Table:
    table = _table("Sources")
    table.add_column(overflow="ellipsis", no_wrap=True)
    for name in ("samples", "of the run", "passes"):
        table.add_column(name, justify="right")
    for folder, size in report.shards.items():
        share = report.weights[folder]
        table.add_row(_plain(folder), f"{size:,}", f"{share:.1%}", f"{share * report.samples_seen / size:,.2f}")
    return table


def _percentiles(report: Report) -> Table:
    table = _table("Percentiles")
    table.add_column(no_wrap=True)
    for p in PERCENTILES:
        table.add_column({0: "least", 50: "median", 100: "most"}.get(p, f"{p} %"), justify="right")
    images, captions = report.images, report.captions
    sample, text = _samples(report).removesuffix("s"), _texts(report).removesuffix("s")
    rows = {
        f"images, each {sample}": _if_several(images.per_sample),
        "shorter side, pixels": images.shorter_side,
        "longer / shorter side": images.aspect_ratio,
        "file, kB": images.kilobytes,
        f"{text}s, each {sample}": _if_several(captions.per_sample),
        f"{text}, characters": captions.characters,
        f"{text}, tokens": captions.tokens,
    }
    for name, values in rows.items():
        if values:
            table.add_row(name, *(f"{v:,.4g}" if v < 1000 else f"{v:,.0f}" for v in values.values()))
    return table


def _if_several(counts: dict[str, float]) -> dict[str, float]:
    return counts if counts.get("p100", 0) > 1 else {}


def _faults(report: Report) -> Table:
    table = _table("Images that cannot be used")
    table.show_header = False
    table.add_column(justify="right", vertical="top")
    table.add_column(overflow="fold")
    for fault in report.images.faults[:SHOWN]:
        table.add_row(
            f"{fault.count:,}", Text.assemble(_plain(fault.reason), "\n", ("first at ", "dim"), _plain(fault.place))
        )
    rest = sum(fault.count for fault in report.images.faults[SHOWN:])
    if rest:
        table.add_row(f"{rest:,}", "for other reasons")
    return table


def _run(report: Report) -> Text:
    return Text.assemble(
        (f"A run of {report.samples_seen:,} samples", "bold"),
        f": {report.steps:,} steps of batch {report.batch:,}, {report.passes:,.2f} passes over the data.",
    )
