"""The loop: bad samples, non-finite steps, logs, budget, what a directory accepts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import altsight_samples
import pytest
import torch

from altsight.core.config import read_json
from altsight.core.errors import UserError
from altsight.data.index import Index
from altsight.data.mix import MixConfig, mix
from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared
from altsight.data.sources import Pairs
from altsight.evals.load import load_method
from altsight.methods.base import Method
from altsight.train.log import read_log
from altsight.train.loop import pretrain
from tests.contract.tiny import tiny_run


def with_data(run: Any, **settings: Any) -> Any:
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **settings))


def break_images(prepared: Prepared, every: int) -> Prepared:
    """Return the data set with every n-th sample changed since it was indexed."""
    assert isinstance(prepared.source, Pairs)
    rows = prepared.source.index.rows.copy()
    rows["check"][::every] ^= 1
    index = Index(prepared.source.index.shards, rows)
    return dataclasses.replace(prepared, source=dataclasses.replace(prepared.source, index=index))


def test_log_summary_and_load(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("clip", sample_data.directory, 16 * 8, batch=16)
    done = pretrain(run, sample_data, tmp_path)
    lines = read_log(tmp_path)
    assert [line["samples"] for line in lines] == [16 * n for n in range(1, 9)]
    fields = {"loss", "loss/contrastive", "lr", "flops", "samples_per_s", "data_wait", "bad", "skipped"}
    assert all(fields <= line.keys() for line in lines)
    assert lines[-1]["flops"] == pytest.approx(done.flops) and done.flops > 0
    assert done.samples_seen == 128 and done.steps == 8
    assert any((tmp_path / "tensorboard").iterdir())
    loaded_run, method = load_method(tmp_path)
    assert loaded_run == run and not method.training


def test_a_finished_run_is_not_run_again(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("mae", sample_data.directory, 32, batch=16)
    first = pretrain(run, sample_data, tmp_path)
    written = (tmp_path / "log.jsonl").stat().st_mtime_ns
    assert pretrain(run, sample_data, tmp_path) == first
    assert (tmp_path / "log.jsonl").stat().st_mtime_ns == written


def test_another_run_in_the_same_folder_is_refused(sample_data: Prepared, tmp_path: Path) -> None:
    pretrain(tiny_run("mae", sample_data.directory, 32, batch=16), sample_data, tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        pretrain(tiny_run("mae", sample_data.directory, 48, batch=16), sample_data, tmp_path)


def test_batch_larger_than_the_data_set(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("mae", sample_data.directory, 10**6, batch=10**6)
    with pytest.raises(UserError, match="larger than the data set"):
        pretrain(run, sample_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_broken_images_are_replaced_counted_and_listed(sample_data: Prepared, tmp_path: Path) -> None:
    run = with_data(tiny_run("mae", sample_data.directory, 16 * 10, batch=16), max_bad_fraction=0.5)
    done = pretrain(run, break_images(sample_data, 20), tmp_path)
    listed = (tmp_path / "bad_samples.txt").read_text().splitlines()
    assert done.bad_samples == len(listed) > 0
    assert all(".tar#" in line and "broken image" in line for line in listed)


def test_too_many_broken_images_stop_the_run(sample_data: Prepared, tmp_path: Path) -> None:
    run = with_data(tiny_run("mae", sample_data.directory, 16 * 10, batch=16), max_bad_fraction=0.01)
    with pytest.raises(UserError, match="max-bad-fraction"):
        pretrain(run, break_images(sample_data, 10), tmp_path)


def test_a_run_shorter_than_a_batch_is_refused(sample_data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shorter than one batch"):
        pretrain(tiny_run("mae", sample_data.directory, 10, batch=16), sample_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_data_than_at_the_start_are_refused(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("mae", sample_data.directory, 64, batch=16)
    pretrain(run, sample_data, tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UserError, match="not those"):
        pretrain(run, other_data(tmp_path), tmp_path)


def other_data(folder: Path) -> Prepared:
    """Return the same sample data prepared with other captions."""
    source = str(altsight_samples.path("clipart", "train"))
    return prepare(PrepareConfig(source, folder / "other", ("{tags}",), "label", vocab_size=300))


@pytest.mark.parametrize("method", ["clip", "mug"])
def test_pairs_and_documents_feed_one_run_which_goes_on_exactly(
    method: str, sample_data: Prepared, tmp_path: Path
) -> None:
    prepare(PrepareConfig(str(altsight_samples.documents()), tmp_path / "docs", as_pairs=True))
    mixed = mix(MixConfig((sample_data.directory, tmp_path / "docs"), tmp_path / "mixed", (3.0, 1.0), vocab_size=2048))
    run = tiny_run(method, mixed.directory, 16 * 12, batch=16, checkpoint_every=16 * 5)
    whole = pretrain(run, mixed, tmp_path / "whole")
    sources = [mixed.source.order(0).sample(p) >= len(sample_data.source) for p in range(16 * 12)]
    assert 0.1 < sum(sources) / len(sources) < 0.4
    for newest in sorted((tmp_path / "whole" / "checkpoints").glob("*192*")):
        newest.unlink()
    (tmp_path / "whole" / "summary.json").unlink()
    again = pretrain(with_data(run, workers=2), mixed, tmp_path / "whole")
    assert (again.sample_hash, again.final_loss) == (whole.sample_hash, whole.final_loss)


def test_a_damaged_checkpoint_costs_only_what_came_after_the_one_before(
    sample_data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run("mae", sample_data.directory, 16 * 8, batch=16, checkpoint_every=64)
    first = pretrain(run, sample_data, tmp_path)
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / "summary.json").unlink()
    second = pretrain(run, sample_data, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged; going on from the one before" in said
    assert (second.sample_hash, second.final_loss) == (first.sample_hash, first.final_loss)


class _Exploding:
    """Makes one method's gradient infinite at chosen steps."""

    def __init__(self, method: Method, steps: set[int]) -> None:
        self.calls, self.steps = 0, steps
        method.encoder.backbone.cls_token.register_hook(self)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return grad * math.inf if self.calls in self.steps else grad


def explode(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    from altsight.train import loop

    real = loop._assemble

    def assemble(run: Any, method: Method, *rest: Any) -> Any:
        training = real(run, method, *rest)
        _Exploding(method, steps)
        return training

    monkeypatch.setattr(loop, "_assemble", assemble)


def test_a_non_finite_step_is_skipped_and_recorded(
    sample_data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode(monkeypatch, {3})
    run = tiny_run("mae", sample_data.directory, 16 * 6, batch=16)
    done = pretrain(run, sample_data, tmp_path)
    assert done.skipped_steps == 1 and done.samples_seen == 96
    (record,) = [torch.load(p, weights_only=True) for p in (tmp_path / "flight").iterdir()]
    assert record["tensors"]["image"].shape[0] == 16 and not math.isfinite(record["gradient_norm"])
    assert record["positions"].tolist() == list(range(32, 48))
    _, method = load_method(tmp_path)
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_many_non_finite_steps_stop_the_run(
    sample_data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode(monkeypatch, {2, 3, 4, 5, 6})
    run = tiny_run("mae", sample_data.directory, 16 * 20, batch=16, max_skipped=3)
    with pytest.raises(UserError, match="3 steps in a row"):
        pretrain(run, sample_data, tmp_path)
    assert len(list((tmp_path / "flight").iterdir())) == 3


def test_probe_is_logged(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("mae", sample_data.directory, 16 * 4, batch=16, probe_every=32)
    pretrain(run, sample_data, tmp_path, lambda method: {"probe/x": 0.5})
    assert [line["samples"] for line in read_log(tmp_path) if "probe/x" in line] == [32, 64]


def test_ema_is_kept_and_loaded(sample_data: Prepared, tmp_path: Path) -> None:
    run = tiny_run("mae", sample_data.directory, 16 * 6, batch=16)
    averaged = dataclasses.replace(run, optim=dataclasses.replace(run.optim, ema=0.5))
    pretrain(run, sample_data, tmp_path / "plain")
    pretrain(averaged, sample_data, tmp_path / "ema")
    plain, ema = load_method(tmp_path / "plain")[1], load_method(tmp_path / "ema")[1]
    a, b = plain.encoder.backbone.cls_token, ema.encoder.backbone.cls_token
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=1e-1)


def test_summary_is_json(sample_data: Prepared, tmp_path: Path) -> None:
    pretrain(tiny_run("supervised", sample_data.directory, 32, batch=16), sample_data, tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert json.dumps(summary) and summary["parameters"]["trained"] > summary["parameters"]["encoder"] / 2
