"""Where weights are, as a user names it: a run, a file, a folder, or a model of a library."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from altsight.core.errors import UserError

SCHEMES = ("timm", "open_clip", "hf")
FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Endings of files of weights; of several kinds in a folder the first is read."""
NAMED = (
    *("encoder.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin"),
)
"""What Altsight and the libraries call the weights of a folder; the first is read, whatever lies beside it. OpenCLIP's
folders on the hub hold the weights of transformers too."""
WRAPPERS = ("state_dict", "model", "module", "teacher", "model_ema", "ema", "target_encoder")
"""What checkpoints call the weights that they hold beside an optimizer's state, in order of preference."""


@dataclass(frozen=True)
class Source:
    """What a user gave to `load`, in parts; what is on disk is read when it is first asked for, and once.

    given: as it was written. scheme: "timm", "open_clip", "hf", or "" for a path alone. model: what the scheme names.
    path: file or folder with the weights; None where the library is to fetch them.
    """

    given: str
    scheme: str
    model: str
    path: Path | None

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """All that the file holds, whatever it is nested in; of a folder, that of its file of weights.

        Raises:
            UserError: there is none, or it cannot be read safely.
        """
        assert self.path is not None, "what a library fetches has no content of its own"
        return read_content(_file_in(self.path) if self.path.is_dir() else self.path)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The tensors by name, taken out of what wraps them ("state_dict", "model", "teacher", ...); fp16 as fp32.

        Raises:
            UserError: the file cannot be read, or holds no tensors by name.
        """
        found: Any = self.content
        while (inner := next((found[w] for w in WRAPPERS if isinstance(found.get(w), Mapping)), None)) is not None:
            found = inner
        tensors = {str(name): _full(value) for name, value in found.items() if isinstance(value, Tensor)}
        if not tensors:
            raise UserError(f"'{self.given}' holds no weights by name: give a file with the state of a model.")
        return tensors

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON file `name` of the folder, {} where there is no folder or no such file.

        Raises:
            UserError: it is damaged.
        """
        if self.path is None or not (self.path / name).is_file():
            return {}
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.path / name}' is no JSON file ({str(error).splitlines()[0]}): mend it.") from None
        return found if isinstance(found, dict) else {}


def parse(given: str) -> Source:
    """Return what `given` says: "timm:NAME", "timm:NAME=FILE", "open_clip:...", "hf:ORG/NAME", a file or a folder.

    Raises:
        UserError: the file or folder does not exist, or a model of Hugging Face's hub is given a file.
    """
    scheme, _, rest = given.partition(":")
    if scheme not in SCHEMES:
        return Source(given, "", "", _existing(Path(given), given))
    model, _, path = rest.partition("=")
    if not model:
        raise UserError(f"'{given}' names no model: write {scheme}:NAME or {scheme}:NAME=FILE.")
    if scheme == "hf" and path:
        raise UserError(f"'{given}' has both a name on the hub and a file: give hf:{model}, or a folder alone.")
    return Source(given, scheme, model, _existing(Path(path), given) if path else None)


def read_content(path: Path) -> Mapping[str, Any]:
    """Return what a .safetensors file, a file of torch.save or a TorchScript archive holds, on the CPU.

    Nothing in the file is executed: of pickles, only plain tensors and containers are read.

    Raises:
        UserError: it cannot be read so.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        # Arguments of a run, which many keep beside the weights, are plain values in a harmless object.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"'{path}' is no file of plain tensors (it is damaged, or holds objects that would have to be executed): "
            "give one that was saved with the state of a model alone."
        ) from None
    except Exception as error:  # what the readers raise on bytes that are no weights is of every kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the weights in '{path}' cannot be read ({reason}): give another file.") from None
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' holds no weights by name: give a file with the state of a model.")
    return content


def _existing(path: Path, given: str) -> Path:
    if not path.exists():
        raise UserError(
            f"there are no weights at '{given}': give the folder of a run (with run.json), a file or a folder of "
            "weights, timm:NAME, open_clip:MODEL/PRETRAINED or hf:ORG/NAME."
        )
    return path


def _file_in(folder: Path) -> Path:
    if named := next((folder / name for name in NAMED if (folder / name).is_file()), None):
        return named
    for ending in FILES:
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) > 1 and any("-of-" in path.name for path in found):
            raise UserError(f"the weights in '{folder}' are in {len(found)} parts: give a folder with one file.")
        if len(found) > 1:
            raise UserError(
                f"'{folder}' holds {len(found)} files of weights ({found[0].name}, {found[1].name}"
                f"{', ...' * (len(found) > 2)}): give one of them."
            )
        if found:
            return found[0]
    raise UserError(f"'{folder}' is no run (it has no run.json), and holds no file of weights: name another folder.")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
