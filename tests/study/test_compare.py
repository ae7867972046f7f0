"""Winners, ties, means over seeds, the verdict and the console table."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from altsight.evals.base import Result
from altsight.methods import METHODS
from altsight.study.compare import Column, clearly_better, tabulate
from altsight.study.table import print_table
from altsight.study.verdict import verdict
from tests.study.made import absent, accuracy, arm, hits, plan, study

KNN = Column("pets", "knn", "top1")
ZERO = Column("pets", "zeroshot", "top1")


def test_a_clear_winner_is_marked_alone() -> None:
    table = tabulate(study(arm("mae", (accuracy(hits(150)),)), arm("clip", (accuracy(hits(250)),))))
    assert table.best(KNN) == "clip"
    assert table.tied(KNN) == []
    assert table.cells["clip", KNN].value == pytest.approx(250 / 400)
    assert table.chance[KNN] == 0.1


def test_pairing_separates_what_overlapping_intervals_do_not() -> None:
    # clip is right wherever mae is, and on 12 images more: every resample with one of them favours clip.
    found = study(arm("mae", (accuracy(hits(200)),)), arm("clip", (accuracy(hits(212)),)))
    table = tabulate(found)
    mae, clip = table.cells["mae", KNN], table.cells["clip", KNN]
    assert mae.high is not None and clip.low is not None and mae.high > clip.low
    assert (clip.mark, mae.mark) == ("best", "")
    # The same two accuracies with errors on different images cannot be told apart.
    other = tabulate(study(arm("mae", (accuracy(hits(200, 200)),)), arm("clip", (accuracy(hits(212)),))))
    assert other.tied(KNN) == ["mae"]


def test_without_hits_overlapping_intervals_decide() -> None:
    def bare(value: float) -> tuple[Result, ...]:
        return (Result("pets", "knn", "top1", value, value - 0.05, value + 0.05),)

    assert tabulate(study(arm("mae", bare(0.5)), arm("clip", bare(0.58)))).tied(KNN) == ["mae"]
    assert tabulate(study(arm("mae", bare(0.5)), arm("clip", bare(0.62)))).tied(KNN) == []


def test_references_and_the_untrained_encoder_never_win() -> None:
    results = [(accuracy(hits(n)),) for n in (390, 380, 100, 120)]
    arms = [arm(n, r) for n, r in zip(("untrained", "supervised", "mae", "clip"), results, strict=True)]
    table = tabulate(study(*arms))
    assert table.best(KNN) == "clip"
    assert table.cells["untrained", KNN].mark == table.cells["supervised", KNN].mark == ""


def test_a_column_that_one_method_enters_has_no_winner() -> None:
    table = tabulate(study(arm("mae", (absent(),)), arm("clip", (accuracy(hits(9), evaluator="zeroshot"),))))
    assert table.best(ZERO) == ""
    assert table.cells["mae", ZERO].note == "not applicable: this encoder has no text tower"


def test_meters_are_kept_apart() -> None:
    meter = Result("pets", "collapse", "std", 0.9)
    found = study(arm("mae", (meter, accuracy(hits(3)))), arm("clip", (meter, accuracy(hits(3)))))
    assert tabulate(found).columns == (KNN,)
    meters = tabulate(found, meters=True)
    assert meters.columns == (Column("pets", "collapse", "std"),)
    assert all(cell.mark == "" for cell in meters.cells.values())


def test_seeds_are_averaged_and_must_agree() -> None:
    two = plan(seeds=(0, 1))

    def arms(mae: tuple[int, int], clip: tuple[int, int]) -> list[object]:
        return [
            arm(name, (accuracy(hits(right)),), seed=seed, of=two)
            for name, rights in (("mae", mae), ("clip", clip))
            for seed, right in enumerate(rights)
        ]

    agreeing = study(*arms((100, 120), (200, 240)), of=two)  # type: ignore[arg-type]
    cell = tabulate(agreeing).cells["clip", KNN]
    assert cell.value == pytest.approx(0.55) and cell.seeds == (0.5, 0.6)
    # The interval is that of each item's mean hit: 200 items always right, 40 half the time, 160 never.
    variance = (200 * 1.0 + 40 * 0.25) / 400 - 0.55**2
    assert cell.low is not None and cell.high is not None
    assert cell.high - cell.low == pytest.approx(2 * 1.96 * np.sqrt(variance / 400), rel=0.1)
    assert clearly_better(agreeing, "clip", "mae", KNN)
    # Far better on average, but worse under one seed: not beyond doubt.
    mixed = study(*arms((100, 220), (300, 210)), of=two)  # type: ignore[arg-type]
    assert tabulate(mixed).best(KNN) == "clip"
    assert tabulate(mixed).tied(KNN) == ["mae"]


def test_the_verdict_names_the_winner_and_its_margin() -> None:
    found = study(
        arm("untrained", (accuracy(hits(40)), absent())),
        arm("mae", (accuracy(hits(150)), absent())),
        arm("clip", (accuracy(hits(250)), accuracy(hits(200), evaluator="zeroshot"))),
    )
    said = verdict(found, tabulate(found))
    assert "mae and clip trained the same encoder (1.00 M parameters) for 640 samples each." in said.summary
    assert "the clearly best method is clip in 1." in said.summary
    assert "Only clip can be measured by zero-shot top-1." in said.summary
    assert "Every method is clearly better than the untrained encoder." in said.summary
    assert len(said.columns) == 1
    assert said.columns[0].startswith("k-NN top-1 on pets: clip 62.5 %")


def test_the_verdict_says_when_nothing_can_be_told_apart() -> None:
    common: dict[str, Any] = {"extra": {"commonest": 0.6}}
    found = study(
        arm("untrained", (accuracy(hits(200), **common),)),
        arm("mae", (accuracy(hits(200, 50), **common),)),
        arm("clip", (accuracy(hits(202, 90), **common),)),
    )
    said = verdict(found, tabulate(found))
    assert "No method is clearly the best" in said.summary
    assert "No method is clearly better than the untrained encoder in any comparison" in said.summary
    assert "commonest class in k-NN top-1 on pets (60.0 %)" in said.summary
    assert "not separable at 95 % from mae 50.0 %" in said.columns[0]


def test_the_verdict_on_many_methods_counts_them() -> None:
    of = plan(methods=tuple(name for name in METHODS if name != "supervised"))
    right = {name: 100 for name in of.methods} | {"clip": 250, "slip": 245, "untrained": 100}
    names = ("untrained", *of.methods)
    found = study(*(arm(n, (accuracy(hits(right[n], i)),), of=of) for i, n in enumerate(names)), of=of)
    said = verdict(found, tabulate(found))
    assert said.summary.startswith(f"{len(of.methods)} methods trained the same encoder")
    assert "Clearly better than the untrained encoder: clip and slip in k-NN top-1 on pets." in said.summary
    assert said.columns[0].endswith("not separable at 95 % from slip 61.3 % (56.5 to 66.0).")
    level = {n: 200 for n in of.methods}
    same = study(*(arm(n, (accuracy(hits(level[n], 3 * i)),), of=of) for i, n in enumerate(of.methods)), of=of)
    (one,) = verdict(same, tabulate(same)).columns
    assert one.endswith(f"and {len(of.methods) - 4} more.") and len(one) < 300


def test_the_console_table_fits_110_columns() -> None:
    metrics = [("knn", "top1"), ("linear", "top1"), ("zeroshot", "top1")]
    metrics += [("retrieval", "image_to_text_r1"), ("retrieval", "text_to_image_r1")]
    full = tuple(accuracy(hits(200 + i), metric=m, evaluator=e) for i, (e, m) in enumerate(metrics))
    found = study(arm("mae", (*full[:2], absent())), arm("clip", full), arm("supervised", full[:1]))
    out = io.StringIO()
    print_table(found, Console(file=out, width=110))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 110
    assert "…" not in out.getvalue()
    row = next(line for line in lines if line.strip().startswith("mae"))
    assert "*50.0 (" in row and row.count("*") == 2
    assert "n/a" in row
    assert any("supervised, ref." in line for line in lines)
