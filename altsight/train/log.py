"""What a run says while it works: JSON lines, TensorBoard, and a progress bar with the time left."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from altsight.core.dist import world

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

console = Console(stderr=True)


def progress_bar(transient: bool = False) -> Progress:
    """Return the bar that all long work draws: what, how far, elapsed, time left; drawn by the main rank only."""
    return Progress(
        TextColumn("{task.description:<16}"),
        # On a narrow terminal the bar gives way, and no number is cut off.
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=transient,
        disable=not world().is_main,
    )


class Log:
    """Writes `log.jsonl` and TensorBoard events in `directory`, on the main rank only.

    Lines past `samples_seen` are dropped at the start: a resumed run goes on from its checkpoint, and so does its log.
    """

    def __init__(self, directory: Path, samples_seen: int, title: str, samples: int) -> None:
        self._path = directory / "log.jsonl"
        self._bar = progress_bar()
        self._task = self._bar.add_task(title, total=samples, completed=samples_seen, note="")
        self._board: SummaryWriter | None = None
        if world().is_main:
            from torch.utils.tensorboard import SummaryWriter

            lines = [line for line in read_log(directory) if line["samples"] <= samples_seen]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=samples_seen)

    def __enter__(self) -> Log:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def advance(self, samples_seen: int, note: str = "") -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=samples_seen)
        if note:
            self._bar.update(self._task, note=note)

    def write(self, line: dict[str, float]) -> None:
        """Append one line; `line["samples"]` is its place on the horizontal axis."""
        if self._board is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, int(line["samples"]))


def read_log(directory: Path) -> list[dict[str, float]]:
    """Return the lines of a run's log ([] where there is none); a last line that was cut off is left out."""
    path = directory / "log.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
