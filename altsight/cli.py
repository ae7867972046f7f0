"""The command line: `altsight COMMAND`. Each command is a tyro interface over frozen dataclasses.

Nothing heavy is imported before the command is known, so that `altsight --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from altsight.core.errors import UserError, did_you_mean

COMMANDS = {
    "demo": ("study:demo", "the like-for-like study on the embedded sample data, with a report"),
    "prepare": ("data:prepare", "index a corpus of images and text: offsets, statistics, tokenizer"),
    "mix": ("data:mix", "draw from several prepared corpora by weight"),
    "check": ("data:check", "report on prepared data before a run"),
    "codebook": ("data:codebook", "make the visual words that beit and splitmask predict, from a corpus"),
    "pretrain": ("pretrain:pretrain", "train one method on prepared data"),
    "eval": ("study:evaluate_runs", "evaluate trained runs, or anyone's weights"),
    "load": ("hub:load", "say what weights are recognised as: anyone's, or a run's"),
    "export": ("hub:export", "write weights for timm, OpenCLIP, Hugging Face or ONNX, checked by the library"),
    "transfer": ("transfer:transfer", "put weights to use: fine-tuning, segmentation, detection, captions, video, ..."),
    "study": ("study:study", "compare methods like for like, as a plan says"),
    "recipes": (
        "study:recipes",
        "the ready runs and studies: what they cost, what their sources found, where their data are",
    ),
}
"""Name -> "module:function" in `altsight.commands`, and what it does."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 stopped by a signal after saving, 2 a mistake to mend."""
    # A SIGTERM ends a command like Ctrl-C does; training grants both between two steps (altsight.train.signals).
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(import_module("altsight").__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"there is no command '{argv[0]}'.{did_you_mean(argv[0], COMMANDS)}")
        module, _, function = COMMANDS[argv[0]][0].partition(":")
        command: Callable[[list[str]], int] = getattr(import_module(f"altsight.commands.{module}"), function)
        return command(argv[1:])
    except UserError as error:
        print(f"altsight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("altsight: stopped.", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [
        "altsight: learns to see from the web's alt text.",
        "",
        "usage: altsight COMMAND [options]      altsight COMMAND --help",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "First steps: `altsight demo`, then README.md.",
    ]
    return "\n".join(lines)
