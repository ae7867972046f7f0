"""Weights out: a folder in the format of another library, checked by that library before it appears."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from altsight.core.errors import UserError, did_you_mean
from altsight.data.folder import appears_whole
from altsight.hub.card import card, of_run, of_weights
from altsight.hub.load import describe, is_run
from altsight.hub.parity import check

FORMATS = {
    "timm": ("timm_write", "timm"),
    "openclip": ("openclip_write", "open_clip"),
    "huggingface": ("huggingface_write", "transformers"),
    "onnx": ("onnx", "onnxruntime"),
    "safetensors": ("own", "safetensors"),
}
"""Name of a format -> the module of this package that writes it, and the library that loads it.

A module has `write(view, folder)`, `compare(view, folder)`, which loads the folder with the library and returns the
largest differences by what differs, and `usage(view, folder)`, the code that a user would run.
"""


@dataclass(frozen=True)
class Exported:
    """What an export says of itself: the library that loads it, the largest differences found, code that uses it."""

    folder: Path
    library: str
    differences: dict[str, float]
    usage: str


def export(source: str, to: str, out: Path, img_size: int = 0, results: Path | None = None) -> Exported:
    """Write the weights at `source` to the folder `out` for another library, which is made to load and use them.

    Args:
        source: as `altsight.load` takes it.
        to: a name in `FORMATS`.
        img_size: side of the images in pixels; 0: that of the weights.
        results: a file that `altsight eval --out` wrote, for the model card; None: results.json in the folder of a run,
            if it has one and keeps its size.

    Raises:
        UserError: the format cannot represent the model, or the library computes something else; `out` is then left as
            it was. Or `out` holds something already.
    """
    if to not in FORMATS:
        raise UserError(f"there is no format '{to}'.{did_you_mean(to, FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is not empty: give --out a folder that does not exist yet.")
    # On the CPU, where all libraries can be compared.
    view, found = describe(source, img_size, device="cpu")
    own = Path(source) / "results.json"
    if results is None and is_run(source) and own.exists() and not img_size:
        results = own
    origin = of_run(Path(source), results) if is_run(source) else of_weights(found, source, results)
    module, library = FORMATS[to]
    writer: Any = import_module(f"altsight.hub.{module}")
    with appears_whole(out) as folder:
        writer.write(view, folder)
        differences: dict[str, float] = writer.compare(view, folder)
        check(differences, library)
        usage: str = writer.usage(view, str(out))
        (folder / "README.md").write_text(card(view, origin, library, usage, differences), encoding="utf-8")
    return Exported(out, library, differences, usage)
