"""The records of a study as a table: one fact a row, one arm a column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from altsight.study.result import Arm
from altsight.study.wording import duration, flat, flops, setting
from altsight.train.state import Summary

ABSENT = "-"


@dataclass(frozen=True)
class Fact:
    """One row: what it is, and its value for every arm (ABSENT where it does not apply).

    differs: arms that should agree do not; None where nothing says that they should.
    """

    name: str
    values: tuple[str, ...]
    differs: bool | None = None


def facts_of(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yield every fact that the arms wrote down, with a value for each of `arms`."""
    yield _per_seed("initial encoder weights", arms, lambda arm: arm.initial_encoder)
    yield _per_seed("sample sequence", arms, _of_summary(lambda s: s.sample_hash))
    yield _over_all("training data", arms, _of_summary(lambda s: s.data))
    for task in dict.fromkeys(measure[0] for measure in measures_of(arms)):
        mine = [measure for measure in measures_of(arms) if measure[0] == task]
        for evaluator in dict.fromkeys(measure[1] for measure in mine):
            measures = [measure for measure in mine if measure[1] == evaluator]
            yield _of_measures(f"evaluation data, {task}: {evaluator}", arms, measures, "data")
        yield _of_measures(f"preprocessing, {task}", arms, mine, "preprocess")
    yield _over_all("samples seen", arms, _of_summary(lambda s: f"{s.samples_seen:,}"))
    yield _over_all("steps", arms, _of_summary(lambda s: f"{s.steps:,}"))
    yield _over_all("batch", arms, _of_run("train.batch"))
    yield _stated("training FLOPs", arms, _of_summary(lambda s: flops(s.flops)))
    yield _stated("wall time", arms, _of_summary(lambda s: duration(s.wall_seconds)))
    yield _stated("of it waiting for data", arms, _of_summary(lambda s: duration(s.wait_seconds)))
    yield _stated("parameters trained", arms, _of_summary(lambda s: f"{s.parameters['trained']:,}"))
    yield _over_all("parameters of the encoder", arms, _of_summary(lambda s: f"{s.parameters['encoder']:,}"))
    yield _over_all("crop", arms, _crop)
    for name in ("name", "lr", "weight_decay", "betas", "warmup_fraction", "clip_norm", "ema"):
        yield _stated(f"optimizer: {name}", arms, _of_run(f"optim.{name}"))
    yield _over_all("precision", arms, _of_summary(lambda s: s.precision))
    yield _over_all("device", arms, _of_summary(lambda s: s.device))
    yield _over_all("world size", arms, _of_summary(lambda s: str(s.world_size)))
    yield _over_all("samples replaced", arms, _of_summary(lambda s: f"{s.bad_samples:,}"))
    yield _over_all("steps skipped", arms, _of_summary(lambda s: f"{s.skipped_steps:,}"))


Pick = Callable[[Arm], str]
Measure = tuple[str, str, str]
"""(task, evaluator, metric)"""


def _stated(name: str, arms: Sequence[Arm], pick: Pick) -> Fact:
    return Fact(name, tuple(pick(arm) for arm in arms))


def _over_all(name: str, arms: Sequence[Arm], pick: Pick) -> Fact:
    values = tuple(pick(arm) for arm in arms)
    return Fact(name, values, len(set(values) - {ABSENT}) > 1)


def _per_seed(name: str, arms: Sequence[Arm], pick: Pick) -> Fact:
    """Arms of one seed should agree; seeds may differ from each other."""
    found = defaultdict(set)
    for arm in arms:
        found[arm.seed].add(pick(arm))
    return Fact(name, tuple(pick(arm) for arm in arms), any(len(v - {ABSENT}) > 1 for v in found.values()))


def _of_summary(pick: Callable[[Summary], str]) -> Pick:
    return lambda arm: pick(arm.summary) if arm.summary else ABSENT


def _of_run(key: str) -> Pick:
    return lambda arm: setting(flat(arm.run)[key]) if arm.run else ABSENT


def _crop(arm: Arm) -> str:
    if not arm.run:
        return ABSENT
    crop = arm.run["data"]["crop"]
    return f"scale {setting(crop['scale'])}, ratio {setting(crop['ratio'])}, {'flip' if crop['flip'] else 'no flip'}"


def measures_of(arms: Sequence[Arm]) -> list[Measure]:
    """Return every measure that any of `arms` was evaluated by."""
    return list(dict.fromkeys((r.task, r.evaluator, r.metric) for arm in arms for r in arm.results))


def _of_measures(name: str, arms: Sequence[Arm], measures: Sequence[Measure], field: str) -> Fact:
    """Return one row for several measures; arms are held against each other measure by measure."""
    picks = [of_result(measure, field) for measure in measures]
    values = tuple(
        ", ".join(dict.fromkeys(pick(arm) for pick in picks if pick(arm) != ABSENT)) or ABSENT for arm in arms
    )
    return Fact(name, values, any(len({pick(arm) for arm in arms} - {ABSENT}) > 1 for pick in picks))


def of_result(measure: Measure, field: str) -> Pick:
    """Return what picks a field of one measure; ABSENT where an arm has no number there."""

    def pick(arm: Arm) -> str:
        rows = (r for r in arm.results if (r.task, r.evaluator, r.metric) == measure and r.value is not None)
        return next((str(getattr(r, field)) for r in rows), "") or ABSENT

    return pick
