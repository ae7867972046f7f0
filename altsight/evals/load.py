"""A View from a method in memory, or from the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from altsight.core.config import read_json
from altsight.core.errors import UserError
from altsight.data.text import load_tokenizer
from altsight.evals.base import Preprocess, View
from altsight.methods.base import Corpus, Method
from altsight.train.checkpoint import load_latest
from altsight.train.log import console
from altsight.train.run import Run, construct, load_run, pick_device


def view_of(method: Method, name: str, crop_ratio: float = 1.0) -> View:
    """Return the View of a method as it is now; the weights are shared, not copied."""
    encoder = method.evaluated
    config = encoder.config
    scale, bias = method.similarity()
    return View(
        name=name,
        encoder=encoder,
        preprocess=Preprocess(config.img_size, config.normalization, crop_ratio),
        feature_point=method.feature_point,
        text=method.text,
        embed_image=method.embed_image if method.text is not None else None,
        project=method.image_projection if method.text is not None else None,
        logit_scale=scale,
        logit_bias=bias,
        caption=getattr(method, "caption", None),
    )


def load_method(directory: Path) -> tuple[Run[Any], Method]:
    """Return the run in `directory` and its method with the newest weights (the averaged ones where EMA was on).

    Raises:
        UserError: the folder does not hold a run with a checkpoint.
    """
    if not (directory / "run.json").is_file():
        raise UserError(f"'{directory}' is not the folder of a run (it has no run.json): give a --out of pretrain.")
    run = load_run(directory / "run.json")
    tokenizer = directory / "tokenizer.json"
    corpus = Corpus(
        load_tokenizer(str(tokenizer)) if tokenizer.exists() else None, tuple(read_json(directory / "classes.json"))
    )
    state = load_latest(directory / "checkpoints", console.print)
    if state is None:
        raise UserError(f"the run in '{directory}' has no checkpoint yet: let it reach its first one.")
    # The initial weights are not needed, nor files that they came from.
    method = construct(run, corpus)
    method.load_state_dict(state["ema"] or state["method"])
    return run, method.eval()


def load_view(directory: Path, crop_ratio: float = 1.0, device: str = "auto") -> View:
    """Return the View of the run in `directory`, on the GPU where there is one; see `load_method` for the errors."""
    run, method = load_method(directory)
    return view_of(method.to(pick_device(device)), run.name, crop_ratio)
