"""The certificate: equal facts are certified, every difference is said, unexplained ones loudly."""

from __future__ import annotations

import dataclasses
from typing import Any

from altsight.methods import METHODS
from altsight.study.certificate import Certificate, certify
from altsight.study.plan import Budget
from altsight.study.records import ABSENT
from tests.study.made import absent, accuracy, arm, hits, plan, study


def fact(certificate: Certificate, name: str) -> tuple[tuple[str, ...], bool | None]:
    found = next(fact for fact in certificate.facts if fact.name == name)
    return found.values, found.differs


def text(sentences: tuple[str, ...]) -> str:
    return "\n".join(sentences)


def test_a_fair_study_says_what_was_the_same() -> None:
    results = (accuracy(hits(200)), absent())
    made = certify(study(arm("untrained", results), arm("mae", results), arm("clip", results)))
    assert made.arms == ("mae", "clip", "untrained")
    assert not made.unexplained
    assert "same encoder weights (1e1e)" in text(made.same)
    assert "mae and clip saw the same 640 samples in the same order (5a5a)" in text(made.same)
    assert "evaluated by the same code on the same images" in text(made.same)
    assert fact(made, "initial encoder weights") == (("1e1e",) * 3, False)
    assert fact(made, "sample sequence") == (("5a5a", "5a5a", ABSENT), False)
    assert fact(made, "evaluation data, pets: knn") == (("d0d0",) * 3, False)
    assert fact(made, "preprocessing, pets") == (("p0p0",) * 3, False)
    assert fact(made, "training FLOPs") == (("6.40 GFLOPs", "6.40 GFLOPs", ABSENT), None)
    assert fact(made, "parameters trained")[0] == ("1,500,000", "1,500,000", ABSENT)
    assert fact(made, "wall time")[0][0] == "1 min 15 s"


def test_parts_besides_the_encoder_are_named() -> None:
    made = certify(study(arm("mae"), arm("clip")))
    assert "mae 500 k (mae part 500 k) and clip 500 k (clip part 500 k)" in text(made.differences)


def test_replaced_samples_explain_another_sequence() -> None:
    made = certify(study(arm("mae"), arm("clip"), arm("supervised", sample_hash="6b6b", bad_samples=7)))
    assert not made.unexplained
    assert "mae 0, clip 0 and supervised 7" in text(made.differences)
    assert fact(made, "sample sequence")[1] is True
    assert "saw the same" not in text(made.same)


def test_another_sequence_without_a_replacement_is_unexplained() -> None:
    made = certify(study(arm("mae"), arm("clip", sample_hash="6b6b")))
    assert "saw different samples (mae 5a5a and clip 6b6b) though none was replaced" in text(made.unexplained)


def test_another_initial_encoder_is_unexplained() -> None:
    made = certify(study(arm("mae"), arm("clip", initial_encoder="2f2f")))
    assert "do not start from the same encoder weights: mae 1e1e and clip 2f2f" in text(made.unexplained)


def test_seeds_may_start_from_different_weights() -> None:
    two = plan(seeds=(0, 1))
    second: dict[str, Any] = {"initial_encoder": "9c9c", "sample_hash": "8d8d"}
    arms = [arm("mae", of=two), arm("clip", of=two)]
    arms += [arm("mae", seed=1, of=two, **second), arm("clip", seed=1, of=two, **second)]
    made = certify(study(*arms, of=two))
    assert not made.unexplained
    assert "under seed 0 start" in text(made.same) and "under seed 1 start" in text(made.same)
    assert made.arms == ("mae, seed 0", "mae, seed 1", "clip, seed 0", "clip, seed 1")
    assert fact(made, "initial encoder weights")[1] is False


def test_other_evaluation_data_are_unexplained() -> None:
    made = certify(study(arm("mae", (accuracy(hits(9)),)), arm("clip", (accuracy(hits(9), data="e1e1"),))))
    assert "pets, knn: arms were not evaluated with equal data (mae d0d0 and clip e1e1)" in text(made.unexplained)
    assert "evaluated by the same code" not in text(made.same)


def test_a_measure_that_only_one_arm_has_is_no_difference() -> None:
    extra = accuracy(hits(9), metric="std", evaluator="collapse", data="aaaa")
    alone = accuracy(hits(9), metric="alignment_pairs", evaluator="collapse", data="bbbb", feature_point="projected")
    made = certify(study(arm("mae", (extra,)), arm("clip", (extra, alone))))
    assert not made.unexplained
    assert "feature point" not in text(made.differences)
    assert fact(made, "evaluation data, pets: collapse") == (("aaaa", "aaaa, bbbb"), False)


def test_other_feature_points_are_said() -> None:
    made = certify(study(arm("mae", (accuracy(hits(9)),)), arm("clip", (accuracy(hits(9), feature_point="cls"),))))
    assert "own feature point (mae mean and clip cls)" in text(made.differences)


def test_a_budget_in_flops_says_why_the_samples_differ() -> None:
    of = plan(budget=Budget(flops=6.4e9))
    made = certify(study(arm("mae", of=of), arm("clip", of=of, samples_seen=320, steps=5, sample_hash="77"), of=of))
    said = text(made.differences)
    assert "budget is 6.40 GFLOPs" in said and "mae 640 and clip 320" in said
    assert "mae 10.0 MFLOPs and clip 20.0 MFLOPs (2.0 times the least)" in said
    assert "mae hides patches of an image from the encoder" in said
    assert not made.unexplained


def test_settings_machines_and_skipped_steps_are_said() -> None:
    of = plan(overrides={"clip": {"optim": {"lr": 0.25}, "train": {"micro_batch": 16}}})
    mae, clip = arm("mae", of=of), arm("clip", of=of, precision="bf16", skipped_steps=2)
    said = text(certify(study(mae, clip, of=of)).differences)
    assert "lr (mae 0.00015 and clip 0.25)" in said
    assert "different settings: micro_batch (mae 0 and clip 16)" in said
    assert "overrides defaults of clip: optim.lr = 0.25 and train.micro_batch = 16" in said
    assert "same precision: mae fp32 and clip bf16" in said
    assert "not finite were left out: mae 0 and clip 2" in said


def test_an_arm_that_skips_facts_is_not_hidden() -> None:
    made = certify(study(arm("mae"), dataclasses.replace(arm("clip"), results=(accuracy(hits(3)),))))
    assert fact(made, "evaluation data, pets: knn")[0] == (ABSENT, "d0d0")


def test_variants_and_pairs_are_said() -> None:
    of = plan(methods=("mae", "clip_hot"), references=(), variants={"clip_hot": "clip"}, pairs=("clip_hot",))
    made = certify(study(arm("mae", of=of), arm("clip_hot", of=of), of=of))
    said = text(made.differences)
    assert "one method under several settings: clip_hot is clip" in said
    assert "Of each document clip_hot sees one image with its sentence" in said


def test_many_arms_are_told_together() -> None:
    of = plan(methods=tuple(name for name in METHODS if name != "supervised"))
    arms = [arm(n, (accuracy(hits(200)),), of=of, flops=640e6 * (i + 1)) for i, n in enumerate(of.arms)]
    said = text(certify(study(*arms, of=of)).differences)
    assert "clip 2.00 MFLOPs (2.0 times the least)" not in said
    assert f"mae 1.00 MFLOPs, virtex 13.0 MFLOPs (13.0 times the least) and supervised {len(arms)}.0 MFLOPs" in said
    assert "the records below have all" in said
    assert "dino, ibot and dinov2 0.4; the other" in said
