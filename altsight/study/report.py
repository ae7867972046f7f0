"""The report: one HTML file with the verdict, the numbers, the curves, the pictures and the certificate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from altsight.core import dist
from altsight.core.config import to_dict
from altsight.evals.base import Task
from altsight.study.certificate import certify
from altsight.study.compare import Cell, Column, Table, tabulate
from altsight.study.figures import Log, loss_figures, probe_figure, read_logs
from altsight.study.gallery import Gallery, make_gallery
from altsight.study.page import Section, axis_choice, bullets, facts, page, plot, wide
from altsight.study.pictures import reconstructions, retrieval
from altsight.study.plan import SAMPLES, Plan, sources
from altsight.study.result import StudyResult
from altsight.study.verdict import budget_words, verdict, who
from altsight.study.wording import amount, duration, evaluator, listed, metric, setting

FILE = "report.html"
SIGNS = {
    "best": '<span class="mark" role="img" aria-label="best">&#9733;</span>',
    "tied": '<span class="mark" role="img" aria-label="not separable from the best">&asymp;</span>',
    "": "",
}
METER_WORDS = (
    "An encoder whose features have collapsed gives nearly the same answer to every image. These meters look at the "
    "features of the test images without any label, and name no winner. Effective rank: how many directions the "
    "features use. Std: 1 where they spread evenly over all directions, 0 where all are equal. Uniformity: the lower, "
    "the more evenly spread. Alignment: the mean squared distance between an image and its mirror image, and between "
    "an image and its caption."
)


def write_report(result: StudyResult, task: Task) -> Path:
    """Write `report.html`, with pictures of `task`, into the study's folder and return its path.

    Collective: every rank calls it, the main rank writes.
    """
    gallery = make_gallery(result, task)
    path = result.directory / FILE
    if dist.world().is_main:
        part = path.with_name(f"{FILE}.part")
        part.write_text(render(result, read_logs(result), gallery), encoding="utf-8")
        part.replace(path)
    return path


def render(result: StudyResult, logs: Sequence[Log], gallery: Gallery) -> str:
    """Return the report as HTML."""
    table = tabulate(result)
    sections = [
        Section("verdict", "Verdict", _verdict(result, table)),
        Section("results", "Results", _results(result, table)),
        Section("curves", "Curves", _curves(result, logs)),
        Section("pictures", "Reconstructions and captions", reconstructions(gallery)),
        Section("retrieval", "Retrieval", retrieval(gallery)),
        Section("certificate", "Certificate of fairness", _certificate(result)),
        Section("collapse", "Collapse meters", _meters(result)),
        Section("run", "What was run", _what_was_run(result)),
    ]
    plan = result.plan
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    subtitle = f"Like-for-like study of {who(result)}; {budget_words(result)} per arm; {seeds}"
    return page(plan.name, subtitle, sections, f"Altsight {result.versions.get('altsight', '')}")


def _verdict(result: StudyResult, table: Table) -> str:
    found = verdict(result, table)
    return f'<p class="verdict">{escape(found.summary)}</p>{bullets(found.columns)}'


def _results(result: StudyResult, table: Table) -> str:
    if not table.columns:
        return "<p>Nothing has been evaluated.</p>"
    notes = list(dict.fromkeys(cell.note for cell in table.cells.values() if cell.value is None and cell.note))
    seeds = ", averaged over seeds and required under every seed" if len(result.plan.seeds) > 1 else ""
    legend = (
        "Per cent, with 95 % bootstrap intervals over the test items. &#9733; best method; &asymp; not separable from "
        f"the best at 95 % (paired bootstrap over the same test items{seeds}). References and the untrained encoder do "
        "not compete."
    )
    missing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    remarks = sorted({cell.note for cell in table.cells.values() if cell.value is not None and cell.note})
    whole = "".join(_task_table(result, table, task, table.columns, notes) for task in _tasks(table))
    return (
        f"<p>{legend}</p>"
        + "".join(_task_table(result, table, task, table.main, notes) for task in _tasks(table))
        + (f'<ol class="notes">{missing}</ol>' if notes else "")
        + _remarks(remarks)
        + f"<details><summary>All metrics</summary>{whole}</details>"
    )


def _tasks(table: Table) -> list[str]:
    return list(dict.fromkeys(column.task for column in table.columns))


def _task_table(result: StudyResult, table: Table, task: str, columns: Sequence[Column], notes: Sequence[str]) -> str:
    mine = [column for column in columns if column.task == task]
    rows = "".join(_result_row(result, table, name, mine, notes) for name in table.arms)
    for label, levels in (("chance", table.chance), ("commonest class", table.commonest)):
        cells = "".join(f"<td>{f'{100 * levels[c]:.1f}' if c in levels else ''}</td>" for c in mine)
        rows += f'<tr class="quiet"><th scope="row">{label}</th>{cells}</tr>'
    counts = [max(table.cells[name, c].n for name in table.arms) for c in mine]
    items = "".join(f"<td>{n:,}</td>" for n in counts)
    rows += f'<tr class="quiet"><th scope="row">test items</th>{items}</tr>'
    shown = wide(f"<table>{_head(mine)}<tbody>{rows}</tbody></table>", f"Results on {task}")
    return f"<h3>{escape(task)}</h3>{shown}"


def _remarks(remarks: Sequence[str]) -> str:
    return f"<details><summary>Remarks on single numbers</summary>{bullets(remarks)}</details>" if remarks else ""


def _head(columns: Sequence[Column]) -> str:
    names = "".join(
        f'<th scope="col">{evaluator(c.evaluator)}<br><span class="muted">{metric(c.metric)}</span></th>'
        for c in columns
    )
    return f'<thead><tr><th scope="col" class="corner">arm</th>{names}</tr></thead>'


def _result_row(result: StudyResult, table: Table, name: str, columns: Sequence[Column], notes: Sequence[str]) -> str:
    kind = result.kind(name)
    label = escape(name) + ("" if kind != "reference" else ' <span class="muted small">reference</span>')
    cells = "".join(_result_cell(table.cells[name, column], notes) for column in columns)
    return f'<tr{"" if kind == "method" else " class=quiet"}><th scope="row">{label}</th>{cells}</tr>'


def _result_cell(cell: Cell, notes: Sequence[str]) -> str:
    if cell.value is None:
        number = f"<sup>{notes.index(cell.note) + 1}</sup>" if cell.note else ""
        return f'<td class="muted"><abbr title="{escape(cell.note)}">n/a</abbr>{number}</td>'
    sign = SIGNS[cell.mark]
    interval = "" if cell.low is None or cell.high is None else f"{100 * cell.low:.1f} to {100 * cell.high:.1f}"
    seeds = ""
    if len(cell.seeds) > 1:
        seeds = f"<small>seeds {100 * min(cell.seeds):.1f} to {100 * max(cell.seeds):.1f}</small>"
    style = ' class="best"' if cell.mark == "best" else ""
    return f"<td{style}>{sign}{100 * cell.value:.1f}<small>{interval}</small>{seeds}</td>"


def _curves(result: StudyResult, logs: Sequence[Log]) -> str:
    probe = probe_figure(result, logs)
    if probe is None:
        shown = "<p>No online probe: the first task has no labels to probe with.</p>"
    else:
        shown = f"<p>{escape(probe.words)}</p>{plot(probe, 'figure-probe')}"
    panels = "".join(
        f"<div><h4>{escape(figure.title)}</h4>{plot(figure, f'figure-loss-{i}')}</div>"
        for i, figure in enumerate(loss_figures(result, logs))
    )
    words = "<p>Losses of different methods measure different things: compare their course, not their height.</p>"
    return (
        f"{axis_choice()}<h3>Online probe</h3>{shown}<h3>Training losses</h3>{words}"
        f'<div class="panels">{panels}</div><noscript><p>The curves need JavaScript.</p></noscript>'
    )


def _certificate(result: StudyResult) -> str:
    certificate = certify(result)
    warning = "".join(f'<p class="warn"><b>Not like for like.</b> {escape(s)}</p>' for s in certificate.unexplained)
    head = "".join(f'<th scope="col">{escape(arm)}</th>' for arm in certificate.arms)
    rows = "".join(
        f'<tr><th scope="row">{escape(fact.name)}</th>'
        + "".join(f"<td{' class=unequal' if fact.differs else ''}>{escape(value)}</td>" for value in fact.values)
        + "</tr>"
        for fact in certificate.facts
    )
    corner = '<th scope="col" class="corner">fact</th>'
    table = f'<table class="records"><thead><tr>{corner}{head}</tr></thead><tbody>{rows}</tbody></table>'
    return (
        f"{warning}<h3>The same for all arms</h3>{bullets(certificate.same)}"
        f"<h3>Different, and why</h3>{bullets(certificate.differences) or '<p>Nothing.</p>'}"
        "<h3>The records</h3><p>Written by the runs themselves. Tinted rows: arms could agree and do not.</p>"
        f"{wide(table, 'Certificate of fairness')}"
    )


def _meters(result: StudyResult) -> str:
    table = tabulate(result, meters=True)
    if not table.columns:
        return "<p>No collapse meters were taken.</p>"
    tables = "".join(_meter_table(table, task) for task in _tasks(table))
    warnings = [f"{name}: {table.cells[name, c].note}." for c in table.columns for name in table.arms]
    return f"<p>{METER_WORDS}</p>{bullets([w for w in dict.fromkeys(warnings) if ': collapsed' in w])}{tables}"


def _meter_table(table: Table, task: str) -> str:
    mine = [column for column in table.columns if column.task == task]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{_number(table.cells[name, column])}</td>" for column in mine)
        + "</tr>"
        for name in table.arms
    )
    names = "".join(f'<th scope="col">{escape(metric(c.metric))}</th>' for c in mine)
    head = f'<thead><tr><th scope="col" class="corner">arm</th>{names}</tr></thead>'
    return f"<h3>{escape(task)}</h3>" + wide(
        f"<table>{head}<tbody>{rows}</tbody></table>", f"Collapse meters on {task}"
    )


def _number(cell: Cell) -> str:
    return "n/a" if cell.value is None else f"{cell.value:.3g}"


def _what_was_run(result: StudyResult) -> str:
    rows = [("command", result.command), ("device", result.device)]
    rows += list(result.versions.items())
    total = sum(arm.summary.wall_seconds for arm in result.arms if arm.summary)
    rows.append(("training time of all arms", duration(total)))
    for name, measured in result.measured.items():
        words = listed([f"{key.replace('_', ' ')} {amount(value)}" for key, value in measured.items()])
        rows.append((f"budget of {name}", f"{result.samples[name]:,} samples ({words}, measured before training)"))
    data = [(key.replace("_", " "), _statistic(value)) for key, value in result.data.items()]
    plan = json.dumps(to_dict(result.plan), indent=2, ensure_ascii=False)
    rights = licences(result.plan)
    return (
        facts(rows, "What was run")
        + f"<h3>Training data</h3>{facts(data, 'Training data')}"
        + (f"<h3>Pictures in this report</h3>{bullets(rights)}" if rights else "")
        + f"<details><summary>The plan</summary><pre>{escape(plan)}</pre></details>"
    )


def _statistic(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(v)}" for key, v in value.items())
    return f"{value:,}" if isinstance(value, int) else setting(value)


def licences(plan: Plan) -> list[str]:
    """Return where the embedded sample data of `plan` come from and under which licence, one sentence a source."""
    names = {word.removeprefix(SAMPLES).partition("/")[0] for word in sources(plan) if word.startswith(SAMPLES)}
    if not names:
        return []
    import altsight_samples

    lines = (altsight_samples.ROOT / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return [f"{what}: {rights}; by {by}." for what, _, rights, by in map(_plain, rows) if what.split("/")[0] in names]


def _plain(cells: Sequence[str]) -> list[str]:
    """Return table cells without Markdown's links and code marks."""
    import re

    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "") for cell in cells]
