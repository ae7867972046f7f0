"""`transfer`: put pre-trained weights to use on a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from altsight.commands.pretrain import stopped
from altsight.commands.study import print_results
from altsight.core import dist
from altsight.core.config import write_json
from altsight.hub.load import load_view
from altsight.train.loop import Stopped
from altsight.transfer import TRANSFERS, find

T = TypeVar("T")


@dataclass(frozen=True)
class Options(Generic[T]):
    """What every transfer is told besides its own settings."""

    weights: tyro.conf.Positional[str]
    """The folder of a run, or anyone's weights, as `altsight load` takes them."""
    settings: Annotated[T, tyro.conf.arg(name="")]
    out: Path
    """Folder for results.json and what else comes out; the same command again goes on where it stopped."""


def transfer(argv: Sequence[str]) -> int:
    """`altsight transfer NAME WEIGHTS --out DIR [settings]`."""
    if not argv or argv[0].startswith("-"):
        print("usage: altsight transfer NAME WEIGHTS --out DIR [settings]\n")
        print("\n".join(f"  {name:<15} {text}" for name, (_, text) in TRANSFERS.items()))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    kind: Any = Options[find(argv[0])]  # type: ignore[misc]
    text = TRANSFERS[argv[0]][1]
    about = f"{text[0].upper()}{text[1:]}."
    options = tyro.cli(kind, args=argv[1:], prog=f"altsight transfer {argv[0]}", description=about)
    try:
        results = options.settings(load_view(options.weights), options.out)
        if dist.world().is_main:
            found = {options.weights: [asdict(result) for result in results]}
            print_results(found)
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "results.json", found)
    except Stopped as stop:
        return stopped(stop)
    finally:
        dist.stop()
    return 0
