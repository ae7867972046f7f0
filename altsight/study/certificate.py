"""The certificate of fairness: what was the same for all arms, what was not, and why.

It is made from the facts that the runs wrote down themselves, not from the plan that asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from altsight.methods import find
from altsight.study.records import ABSENT, Fact, Measure, facts_of, measures_of, of_result
from altsight.study.result import Arm, StudyResult
from altsight.study.wording import FEW, amount, flat, flops, listed, setting
from altsight.train.state import Summary

_PER_RUN = {"name", "train.samples", "train.seed", "train.probe_every"}
"""Settings of a run that are stated elsewhere: its name, its budget and its seed."""


@dataclass(frozen=True)
class Certificate:
    """The table and its reading in plain sentences."""

    arms: tuple[str, ...]
    facts: tuple[Fact, ...]
    same: tuple[str, ...]
    differences: tuple[str, ...]
    unexplained: tuple[str, ...]
    """Differences that nothing in the records accounts for; the comparison is then not like for like."""


def certify(result: StudyResult) -> Certificate:
    """Return the certificate of `result`."""
    arms = [arm for name in result.names for arm in result.of(name)]
    facts = tuple(facts_of(arms))
    same, differences, unexplained = _Sentences(result, arms).all()
    labels = tuple(arm.name if len(result.plan.seeds) == 1 else f"{arm.name}, seed {arm.seed}" for arm in arms)
    return Certificate(labels, facts, same, differences, unexplained)


class _Sentences:
    """Reads the facts; every method adds to one of the three lists."""

    def __init__(self, result: StudyResult, arms: Sequence[Arm]) -> None:
        self.result, self.arms = result, arms
        self.trained = [(arm, arm.summary) for arm in arms if arm.summary]
        self.same: list[str] = []
        self.differences: list[str] = []
        self.unexplained: list[str] = []

    def all(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return what is the same, what differs and why, and what differs without an explanation."""
        for seed in dict.fromkeys(arm.seed for arm in self.arms):
            self._start(seed)
            self._sequence(seed)
        self._variants()
        self._pairs()
        self._evaluation()
        self._amounts()
        self._parameters()
        self._cost()
        self._settings()
        self._machines()
        self._skipped()
        return tuple(self.same), tuple(self.differences), tuple(self.unexplained)

    def _start(self, seed: int) -> None:
        found = {arm.name: arm.initial_encoder for arm in self.arms if arm.seed == seed}
        under = self._under(seed)
        if len(set(found.values())) == 1:
            self.same.append(f"All arms{under} start from the same encoder weights ({next(iter(found.values()))}).")
        else:
            self.unexplained.append(f"The arms{under} do not start from the same encoder weights: {_each(found)}.")

    def _sequence(self, seed: int) -> None:
        rows = [(arm, summary) for arm, summary in self.trained if arm.seed == seed]
        under = self._under(seed)
        for seen in dict.fromkeys(summary.samples_seen for _, summary in rows):
            group = [(arm, summary) for arm, summary in rows if summary.samples_seen == seen]
            hashes = {arm.name: summary.sample_hash for arm, summary in group}
            if len(set(hashes.values())) == 1:
                if len(group) > 1:
                    names, sequence = listed(list(hashes)), group[0][1].sample_hash
                    self.same.append(f"{names}{under} saw the same {seen:,} samples in the same order ({sequence}).")
                continue
            replaced = {arm.name: summary.bad_samples for arm, summary in group}
            if len(set(replaced.values())) == 1 and not any(replaced.values()):
                self.unexplained.append(
                    f"{listed(list(hashes))}{under} saw different samples ({_each(hashes)}) though none was replaced."
                )
            else:
                self.differences.append(self._replacements(group, under))

    def _replacements(self, group: Sequence[tuple[Arm, Summary]], under: str) -> str:
        counts = listed([f"{arm.name} {summary.bad_samples:,}" for arm, summary in group])
        return (
            f"The sample sequences{under} differ where a method could not use a sample (a broken image, or one without "
            f"the text or label that it learns from) and took another in its place; samples replaced: {counts}. Each "
            "run lists its own in bad_samples.txt; all other positions hold the same sample."
        )

    def _variants(self) -> None:
        variants = {arm: method for arm, method in self.result.plan.variants.items() if self.result.of(arm)}
        if variants:
            said = [f"{arm} is {method}" for arm, method in variants.items()]
            self.differences.append(f"Arms may be one method under several settings: {listed(said)}.")

    def _pairs(self) -> None:
        pairs = [arm for arm in self.result.plan.pairs if self.result.of(arm)]
        if pairs:
            see = "sees" if len(pairs) == 1 else "see"
            self.differences.append(
                f"Of each document {listed(pairs)} {see} one image with its sentence, and the other arms all of it."
            )

    def _evaluation(self) -> None:
        unequal = dict.fromkeys(
            f"{task}, {evaluator}: arms were not evaluated with equal {what} ({_each(found)})."
            for task, evaluator, metric in measures_of(self.arms)
            for what, field in (("data", "data"), ("preprocessing", "preprocess"))
            if len(set((found := self._by_arm((task, evaluator, metric), field)).values())) > 1
        )
        if unequal:
            self.unexplained += unequal
        elif any(arm.results for arm in self.arms):
            self.same.append(
                "All arms were evaluated by the same code on the same images, labels and captions, preprocessed alike."
            )
        points = dict.fromkeys(
            f"{task}, {evaluator}: features are read at each method's own feature point ({_each(found)})."
            for task, evaluator, metric in measures_of(self.arms)
            if len(set((found := self._by_arm((task, evaluator, metric), "feature_point")).values())) > 1
        )
        self.differences += points

    def _amounts(self) -> None:
        seen = {arm.name: f"{summary.samples_seen:,}" for arm, summary in self.trained}
        if len(set(seen.values())) < 2:
            return
        budget = self.result.plan.budget
        if budget.kind == "samples":
            self.differences.append(
                f"Samples are rounded down to whole batches, so arms saw different numbers: {_each(seen)}."
            )
            return
        what = flops(budget.flops) if budget.kind == "flops" else f"{budget.minutes:g} minutes of training"
        self.differences.append(
            f"The budget is {what} for every arm, and a sample costs each method a different share of it, so the arms "
            f"saw different numbers of samples: {_each(seen)}. The shorter sequences are the beginnings of the longer "
            "ones."
        )

    def _parameters(self) -> None:
        own = {arm.name: {n: size for n, size in arm.modules.items() if n != "encoder"} for arm, _ in self.trained}
        besides = {name: sum(parts.values()) for name, parts in own.items()}
        if len({_parts_of(parts) for parts in own.values()}) < 2:
            return
        if len(own) > FEW:
            least, most = min(besides, key=besides.__getitem__), max(besides, key=besides.__getitem__)
            said = (
                f", from {least} {amount(besides[least])} to {most} {amount(besides[most])}; the records below have all"
            )
        else:
            shown = [f"{name} {_parts_of(parts)}" for name, parts in own.items()]
            said = f": {listed(shown)}"
        encoder = amount(self.trained[0][1].parameters["encoder"])
        self.differences.append(
            f"Besides the encoder ({encoder} parameters), methods train parts of their own{said}. Only the encoder is "
            "compared, and the text tower where images and texts are matched."
        )

    def _cost(self) -> None:
        per_sample = {arm.name: summary.flops / max(summary.samples_seen, 1) for arm, summary in self.trained}
        if len({flops(x) for x in per_sample.values()}) < 2:
            return
        least = min(per_sample.values())
        shown = per_sample
        if len(per_sample) > FEW:
            ranked = sorted(per_sample, key=lambda name: per_sample[name])
            shown = {name: per_sample[name] for name in (ranked[0], ranked[len(ranked) // 2], ranked[-1])}
        times = {name: "" if x == least else f" ({x / least:.1f} times the least)" for name, x in shown.items()}
        costs = [f"{name} {flops(x)}{times[name]}" for name, x in shown.items()]
        text = f"Forward and backward of one sample cost {listed(costs)}"
        if len(shown) < len(per_sample):
            text += ", the least, the middle and the most; the records below have all"
        masked = [name for name in per_sample if find(self.result.plan.method_of(name)).masked]
        if masked:
            text += (
                f"; {listed(masked)} hide{'s' if len(masked) == 1 else ''} patches of an image from the encoder, which "
                "costs less unless mask tokens take their places"
            )
        self.differences.append(f"{text}.")

    def _settings(self) -> None:
        runs = {arm.name: flat({k: v for k, v in arm.run.items() if k != "method"}) for arm, _ in self.trained}
        if not runs:
            return
        keys = [key for key in next(iter(runs.values())) if key not in _PER_RUN]
        unequal = [key for key in keys if len({setting(run.get(key)) for run in runs.values()}) > 1]
        own = [key for key in unequal if key.startswith("optim.")]
        if own:
            self.differences.append(
                "Every method is trained with the optimizer settings of its source, or those that the plan gives it: "
                f"{_settings_of(own, runs)}."
            )
        others = [key for key in unequal if key not in own]
        if others:
            self.differences.append(f"The plan gives arms different settings: {_settings_of(others, runs)}.")
        for name, over in self.result.plan.overrides.items():
            changed = listed([f"{key} = {setting(value)}" for key, value in flat(over).items()])
            self.differences.append(f"The plan overrides defaults of {name}: {changed}.")

    def _machines(self) -> None:
        for what in ("precision", "device", "world_size"):
            found = {self._label(arm): str(getattr(summary, what)) for arm, summary in self.trained}
            if len(set(found.values())) > 1:
                self.differences.append(f"Not all arms ran with the same {what.replace('_', ' ')}: {_each(found)}.")

    def _skipped(self) -> None:
        found = {self._label(arm): f"{summary.skipped_steps:,}" for arm, summary in self.trained}
        if any(summary.skipped_steps for _, summary in self.trained):
            self.differences.append(f"Steps whose gradient was not finite were left out: {_each(found)}.")

    def _by_arm(self, measure: Measure, field: str) -> dict[str, str]:
        pick = of_result(measure, field)
        return {self._label(arm): pick(arm) for arm in self.arms if pick(arm) != ABSENT}

    def _label(self, arm: Arm) -> str:
        return f"{arm.name}{self._under(arm.seed)}"

    def _under(self, seed: int) -> str:
        return f" under seed {seed}" if len(self.result.plan.seeds) > 1 else ""


def _each(values: dict[str, str]) -> str:
    """Return what every arm has; of many arms those that have the same together, and the commonest last."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    commonest = max(by_value, key=lambda value: len(by_value[value]))
    if len(values) <= FEW or len(by_value[commonest]) == 1:
        return listed([f"{name} {value}" for name, value in values.items()])
    rarer = [f"{listed(names)} {value}" for value, names in by_value.items() if value != commonest]
    return "; ".join([*rarer, f"the other {len(by_value[commonest])} {commonest}"])


def _parts_of(sizes: dict[str, int]) -> str:
    parts = [f"{name.replace('_', ' ')} {amount(size)}" for name, size in sizes.items()]
    return f"{amount(sum(sizes.values()))} ({listed(parts)})" if parts else "nothing"


def _settings_of(keys: Sequence[str], runs: dict[str, dict[str, Any]]) -> str:
    per_key = [f"{key.partition('.')[2]} ({_each({n: setting(r.get(key)) for n, r in runs.items()})})" for key in keys]
    return "; ".join(per_key)
