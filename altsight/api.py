"""The Python interface: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from altsight.core.errors import UserError, did_you_mean
from altsight.data.mix import MixConfig
from altsight.data.mix import mix as _mix
from altsight.data.prepare import PrepareConfig
from altsight.data.prepare import prepare as _prepare
from altsight.data.prepared import Prepared, open_prepared
from altsight.evals import evaluate as evaluate
from altsight.evals.base import Result, Task
from altsight.evals.base import View as View
from altsight.evals.load import load_view as load_run
from altsight.hub.export import Exported
from altsight.hub.export import export as export_weights
from altsight.hub.load import load_view
from altsight.recipes import recipe as recipe
from altsight.recipes import sample_tasks as sample_tasks
from altsight.study.plan import Plan, locate, read_plan
from altsight.study.run import StudyResult, online_probe
from altsight.study.run import study as _study
from altsight.train.loop import pretrain as _pretrain
from altsight.train.run import Run as Run
from altsight.train.run import override as override
from altsight.transfer import find as find_transfer


def prepare(
    source: str | Path,
    out: str | Path,
    captions: Sequence[str] = ("{txt}",),
    label: str = "",
    tokenizer: str = "",
    vocab_size: int = 8192,
    **options: Any,
) -> Prepared:
    """Index the corpus at `source` and write index, statistics and tokenizer to the folder `out`.

    `source` is a file, a folder, a pattern or a URL in any of the layouts of docs/bring_your_own_data.md, or a set of
    the embedded sample data such as "samples:clipart/train". options: the other fields of
    `altsight.data.prepare.PrepareConfig` (images_only, image, images, as_pairs, min_similarity, ...).

    Raises:
        UserError: the source is missing, damaged, or has no captions.
    """
    where = locate(str(source))
    return _prepare(PrepareConfig(where, Path(out), tuple(captions), label, tokenizer, vocab_size, **options))


def mix(sources: Sequence[str | Path], out: str | Path, weights: Sequence[float] = (), **options: Any) -> Prepared:
    """Write to the folder `out` a data set that draws from several prepared ones by weight (by size without any).

    options: the other fields of `altsight.data.mix.MixConfig` (tokenizer, vocab_size).

    Raises:
        UserError: a source was not prepared, or the weights do not fit.
    """
    return _mix(MixConfig(tuple(map(Path, sources)), Path(out), tuple(weights), **options))


def pretrain(run: Run[Any], out: str | Path = "", probe: Task | None = None) -> View:
    """Pre-train `run` into the folder `out` (runs/NAME by default) and return the View of what was learned.

    A folder that already holds this run goes on where it stopped. `probe`: a task for the online k-NN probe, taken
    every `run.train.probe_every` samples.

    Raises:
        UserError: the run cannot be done as asked.
    """
    directory = Path(out or f"runs/{run.name}")
    online = online_probe(run.train, run.name, probe) if probe else None
    _pretrain(run, open_prepared(Path(run.data.path)), directory, online)
    return load_run(directory)


def load(path: str | Path, img_size: int = 0) -> View:
    """Return the View of a run's folder, or of anyone's weights: `encode_image`, `encode_text`, `features`.

    Args:
        path: a folder or file, or "timm:NAME", "timm:NAME=FILE", "open_clip:MODEL/PRETRAINED", "hf:ORG/NAME"
            (docs/weights.md).
        img_size: side of the images in pixels; position tables are resampled. 0: that of the weights.

    Raises:
        UserError: there are no weights, none that are known, or the run has no checkpoint yet.
    """
    return load_view(str(path), img_size=img_size)


def export(source: str | Path, to: str, out: str | Path, img_size: int = 0) -> Exported:
    """Write a run or anyone's weights to the folder `out` for another library, and have it compute the same.

    Args:
        source: as `load` takes it.
        to: timm, openclip or huggingface (both for dual encoders), onnx, or safetensors.
        img_size: side of the images in pixels; 0: that of the weights.

    Raises:
        UserError: the format cannot represent the model, or the library computes something else; nothing is written.
    """
    return export_weights(str(source), to, Path(out), img_size)


def transfer(name: str, view: View, out: str | Path, /, **settings: Any) -> list[Result]:
    """Put `view` to use on a task, into the folder `out`; `altsight transfer` lists the names and their settings.

    Raises:
        UserError: there is no such transfer or setting, or it cannot be done as asked.
    """
    kind = find_transfer(name)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise UserError(f"the transfer '{name}' has no setting '{setting}'.{did_you_mean(setting, known)}")
    return kind(**settings)(view, Path(out))


def study(plan: Plan | str | Path, out: str | Path) -> StudyResult:
    """Run the like-for-like study of `plan` (a Plan, or a TOML file) into the folder `out` and write report.html.

    Raises:
        UserError: the plan is wrong.
    """
    return _study(plan if isinstance(plan, Plan) else read_plan(Path(plan)), Path(out))
