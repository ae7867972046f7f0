"""What transfers have in common: how long they train, the one loop that trains them, and the copied image tower."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.dist import world
from altsight.core.errors import UserError
from altsight.data.prepared import Prepared
from altsight.data.sources import Source
from altsight.data.views import Crop
from altsight.evals.base import Result, View
from altsight.evals.encoder_file import write_encoder
from altsight.methods.base import Method
from altsight.nn.encoder import Encoded, Encoder
from altsight.nn.resample import resized
from altsight.train.checkpoint import load_latest
from altsight.train.log import console
from altsight.train.loop import Probe, train
from altsight.train.run import DataConfig, Run, TrainConfig, pick_device, weights_hash

Say = Callable[[str], None]
"""Is told what is being done, a few words at a time."""


class Transfer(Protocol):
    """A frozen dataclass of settings, called with a view and the folder for what comes out; see `TRANSFERS`.

    Returns the results. Training writes run.json, log.jsonl and checkpoints to the folder, and the same call again
    goes on where it stopped. The view itself is left as it was.
    """

    def __call__(self, view: View, out: Path) -> list[Result]: ...


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a transfer trains; `epochs` and `batch` are its source's unless they are set."""

    epochs: float
    batch: int
    micro_batch: int = 0
    """Samples that one rank computes at a time; 0: its whole share."""
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    workers: int = 1
    """Processes that decode ahead; the samples do not depend on it."""
    checkpoint_every: int = 50_000
    """Samples between checkpoints; one is written at the end in any case."""
    max_bad_fraction: float = 0.05
    """The training stops when more than this share of the samples had to be replaced."""

    def samples(self, size: int) -> int:
        """Return the samples seen in training on a set of `size`: whole batches, at least one.

        Raises:
            UserError: there is nothing to train for.
        """
        if self.epochs <= 0 or self.batch < 1:
            raise UserError(
                f"{self.epochs:g} epochs in batches of {self.batch} train nothing: set --fit.epochs above 0 and "
                "--fit.batch to 1 or more."
            )
        return max(round(self.epochs * size) // self.batch, 1) * self.batch


@dataclass(frozen=True)
class Identity:
    """What a training is known by: a hash of the weights that it starts from, the settings, the names of classes."""

    weights: str
    settings: Any
    names: tuple[str, ...] = ()


def known_by(start: nn.Module, settings: Any, names: Sequence[str] = (), **free: Any) -> Identity:
    """Return the identity of a training that starts from the weights of `start`.

    settings: the transfer, whose `fit` is part of the run anyway. free: its fields that training does not depend on,
    with any fixed value, such as the set that is tested on.
    """
    return Identity(weights_hash(start), replace(settings, fit=FitConfig(0, 0), **free), tuple(names))


def prepared_for(source: Source, where: Path, digest: str) -> Prepared:
    """Return a data set that only a transfer reads, as the loop wants it; `where` is named in messages."""
    return Prepared(where, source, digest=digest)


def fit(
    name: str,
    make: Callable[[], Method],
    settings: Any,
    optim: OptimConfig,
    how: FitConfig,
    data: Prepared,
    out: Path,
    probe: Probe | None = None,
) -> Method:
    """Train what `make` builds (weights set) in the one loop, and return it with its last weights, in eval mode.

    Args:
        name: of the transfer, in run.json and in messages.
        settings: frozen dataclass that the run is identified by: the transfer's own settings and the weights' name.
        out: folder of the training; one that holds the same run goes on where it was, to the same bits.

    Raises:
        UserError: it cannot be done as asked, or the folder holds another run.
        Stopped: a signal asked for the end; a checkpoint was written.
    """
    method = make()
    run = Run(
        name=name,
        method=settings,
        optim=optim,
        encoder=method.encoder.config,
        data=DataConfig(
            path=str(data.directory), crop=Crop(), workers=how.workers, max_bad_fraction=how.max_bad_fraction
        ),
        train=TrainConfig(
            samples=how.samples(len(data.source)),
            batch=how.batch,
            micro_batch=how.micro_batch,
            seed=how.seed,
            precision=how.precision,
            device=how.device,
            compile=how.compile,
            checkpoint_every=how.checkpoint_every,
        ),
    )
    try:
        train(run, lambda: method, data, out, probe)
    except UserError as error:
        raise UserError(_with_own_flags(str(error))) from None
    state = load_latest(out / "checkpoints", console.print)
    assert state is not None, "a finished run has a checkpoint"
    method.load_state_dict(state["ema"] or state["method"])
    return method.to(pick_device(how.device)).eval()


def _with_own_flags(message: str) -> str:
    """Return a message of the loop with its settings under the names that they have in a transfer."""
    known = {field.name.replace("_", "-") for field in fields(FitConfig)}

    def renamed(flag: re.Match[str]) -> str:
        return f"--fit.{flag[1]}" if flag[1] in known else flag[0]

    return re.sub(r"--(?:train|data)\.([a-z-]+)", renamed, message)


class ImageTower(nn.Module):
    """A copy of the image side of a dual encoder's view: images -> vectors in the joint space, un-normalised.

    Only what an image's vector depends on keeps its gradient: decoders, text towers and scales are frozen.

    Args:
        changes: to the encoder's config, as `resized` takes them.

    Raises:
        UserError: the view has no text tower.
    """

    def __init__(self, view: View, **changes: Any) -> None:
        super().__init__()
        need_text(view, "a transfer by the names of classes")
        assert view.embed_image is not None
        self.encoder = resized(view.encoder, **changes)
        # The copy's module holds the resized encoder where the view's holds its own.
        self.embed_image = copy.deepcopy(view.embed_image, {id(view.encoder): self.encoder})
        self.owner: nn.Module = self.embed_image.__self__  # type: ignore[attr-defined]
        freeze_unused(self, self, self.encoder)

    def forward(self, encoded: Encoded) -> Tensor:
        """Return the vectors (B, E) of encoded images."""
        return self.embed_image(encoded)


def name_of_projection(view: View) -> str:
    """Return the name of `view.project` in the module that embeds images, as in an `ImageTower`'s owner; "" if none."""
    owner: nn.Module = view.embed_image.__self__  # type: ignore[union-attr]
    return next((name for name, module in owner.named_modules() if module is view.project), "")


@torch.enable_grad()
def freeze_unused(module: nn.Module, read: Callable[[Encoded], Tensor], encoder: Encoder) -> None:
    """Freeze the parameters of `module` that what is read of an encoded image does not depend on.

    Ranks wait for the gradient of every parameter that is trained, and weight decay must not shrink what has none.
    """
    size = encoder.config.img_size
    images = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = module.training
    # Running statistics of batch norm must not see the empty image.
    module.eval()
    found = torch.autograd.grad(read(encoder(images)).sum(), wanted, allow_unused=True)
    module.train(training)
    for parameter, gradient in zip(wanted, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def keep_encoder(view: View, encoder: Encoder, out: Path) -> None:
    """Write what `view`'s encoder became to encoder.safetensors in `out`, which `altsight load` reads."""
    if world().is_main:
        write_encoder(with_view(view, encoder), out / "encoder.safetensors")


def need_text(view: View, what: str) -> None:
    """Raise UserError if `view` has no text tower, which `what` needs."""
    if not view.is_dual:
        raise UserError(
            f"{what} needs class names as vectors, and '{view.name}' has no text tower: use a dual encoder, such as a "
            "run of clip or weights of OpenCLIP."
        )


def with_view(view: View, encoder: Encoder, **fields: Any) -> View:
    """Return `view` with another encoder (and other `fields`), and nothing cached."""
    preprocess = replace(view.preprocess, size=encoder.config.img_size)
    changes: dict[str, Any] = {"encoder": encoder, "preprocess": preprocess, "cache": {}} | fields
    return replace(view, **changes)
