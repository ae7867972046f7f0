"""The progress bar on a narrow terminal."""

from __future__ import annotations

import io

from rich.console import Console

from altsight.train.log import progress_bar


def test_no_number_of_the_bar_is_cut_off_on_80_columns() -> None:
    bar, shown = progress_bar(), io.StringIO()
    bar.add_task("attentive_probe", total=192_000, completed=191_936, note="loss 13.308, wait 194.0 ms")
    Console(file=shown, width=80).print(bar.make_tasks_table(bar.tasks))
    assert "191936/192000" in shown.getvalue() and "wait 194.0 ms" in shown.getvalue()
    assert "…" not in shown.getvalue() and len(shown.getvalue().splitlines()) == 1
