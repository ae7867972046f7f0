"""Features kept on disk: a later command on the same weights and the same images encodes nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.evals.base import View
from altsight.train.run import weights_hash

LAYOUT = 1
"""Of what is stored; another one is another name."""


def place(folder: Path, view: View, split: str, images: Sequence[str]) -> Path:
    """Return the file for the features of images, by all that they depend on.

    That is the architecture and its weights, the projection to the joint space, the feature point, the preprocessing,
    the precision and the images.

    Args:
        split: stands in the file's name, for who looks into the folder.
        images: a digest of every image, in order.

    Raises:
        UserError: the view projects to the joint space by what has no weights to be told by.
    """
    known = hashlib.sha256(repr((LAYOUT, view.feature_point, view.preprocess.hash(), str(view.dtype))).encode())
    known.update(_weights(view).encode())
    known.update("\n".join(images).encode())
    return folder / f"{split}-{known.hexdigest()[:16]}.safetensors"


def read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors in a file; None where there is none, or it is damaged and has to be made anew."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` under another name and rename it, so that no reader sees half of them.

    Raises:
        UserError: the folder cannot be written to.
    """
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the features cannot be kept in '{path.parent}' ({error}): choose another folder.") from None
    finally:
        part.unlink(missing_ok=True)


def _weights(view: View) -> str:
    """Return what names the modules that the features come from; computed once for each view."""
    if "weights" not in view.cache:
        modules: list[nn.Module] = [view.encoder]
        if view.embed_image is not None:
            owner = getattr(view.embed_image, "__self__", view.embed_image)
            if not isinstance(owner, nn.Module):
                raise UserError(
                    f"the features of '{view.name}' cannot be kept: its projection is no module whose weights tell it "
                    "from others."
                )
            modules.append(owner)
        # The representation tells activations apart, which have no weights.
        named = [f"{module!r} {weights_hash(module)}" for module in modules]
        view.cache["weights"] = " ".join([repr(view.encoder.config), *named])
    return str(view.cache["weights"])
