"""Caption metrics: the same as pycocoevalcap's to 1e-6, and CIDEr-D by its definition."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from altsight.core.errors import UserError
from altsight.evals.caption_metrics import CaptionMetric, Score, caption_scores, corpus_bleu, plain, ptb

REFERENCES = [
    ["A red fox runs over the snow.", "a fox in the snow", "Snow; and a fox (running).", "..."],
    ["two children play chess in a garden", "Children's chess"],
    ["the old harbour seen from above at night"],
    ["bread and cheese lie on wooden boards", "cheese, bread -- and a board"],
    ["a man isn't riding a red bicycle", "nobody rides the bicycle"],
]
CAPTIONS = ["a fox runs over snow", "two children in a garden", "", "cheese and cheese and bread", "a red bicycle!"]
FAST: tuple[CaptionMetric, ...] = ("bleu", "rouge_l", "cider")


@pytest.fixture(params=[True, False], ids=["java", "no java"])
def java(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and shutil.which("java") is None:
        pytest.skip("there is no Java")
    if not request.param:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    return bool(request.param)


def scores(captions: list[str], references: list[list[str]], *metrics: CaptionMetric) -> dict[str, Score]:
    return {score.metric: score for score in caption_scores(captions, references, metrics or FAST)}


def test_equal_to_the_reference_library(java: bool) -> None:
    """With Java, all the way from the raw texts, as pycocoevalcap's own evaluation does."""
    if java:
        truth = PTBTokenizer().tokenize({i: [{"caption": t} for t in texts] for i, texts in enumerate(REFERENCES)})
        said = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
    else:
        truth = {i: plain(texts) for i, texts in enumerate(REFERENCES)}
        said = {i: plain([text]) for i, text in enumerate(CAPTIONS)}
    found = scores(CAPTIONS, REFERENCES)
    expected = dict(zip(("bleu1", "bleu2", "bleu3", "bleu4"), Bleu(4).compute_score(truth, said, 0)[0], strict=True))
    expected |= {"rouge_l": Rouge().compute_score(truth, said)[0], "cider": Cider().compute_score(truth, said)[0]}
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected, abs=1e-6)
    moved = {i: said[(i + 1) % 5] for i in said}
    assert found["cider"].chance == pytest.approx(Cider().compute_score(truth, moved)[0], abs=1e-9)
    assert found["bleu2"].chance == pytest.approx(Bleu(4).compute_score(truth, moved, 0)[0][1], abs=1e-9)
    assert all(("not comparable" in score.note) is not java for score in found.values())
    for score in found.values():
        assert score.low is not None and score.value is not None and score.high is not None
        assert score.low <= score.value <= score.high and score.low < score.high


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_ptb_tokens_equal_the_library_whatever_the_text() -> None:
    texts = [
        "A man (tall), isn't here.",
        "",
        "Two dogs -- one's brown! ",
        "caf\u00e9 \u2014 na\u00efve \u201cquoted\u201d $5.00",
        "a/b",
        "",
    ]
    expected = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert ptb(texts) == [expected[i][0] for i in range(len(texts))]
    assert ptb(["one\ntwo\r\nthree\u2028four", "five"]) == ["one two three four", "five"]


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_java_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx1k")
    with pytest.raises(UserError, match="Java does not run the PTB tokenizer"):
        ptb(["a"])


def test_bleu_of_a_set_from_sums(java: bool) -> None:
    """Its interval resamples images: two kinds of images, all right and all wrong, half of each."""
    references, wrong = [["a b c d e f"]] * 40, "v w x y"
    found = scores(["a b c d e f"] * 20 + [wrong] * 20, references, "bleu")["bleu1"]
    # 120 of 200 words match; 200 words against 240 of the references.
    brevity = np.exp(1 - 240 / 200)
    assert found.value == pytest.approx(0.6 * brevity, abs=1e-6)
    assert found.low is not None and found.high is not None
    # A share p of right images: 6 p of 4 + 2 p words match. p has a standard deviation of 0.079.
    spread = [6 * p / (4 + 2 * p) * np.exp(1 - 6 / (4 + 2 * p)) for p in (0.5 - 1.96 * 0.079, 0.5 + 1.96 * 0.079)]
    assert [found.low, found.high] == pytest.approx(spread, abs=0.04)


def test_corpus_bleu_by_hand() -> None:
    counts = np.array([[6.0, 4, 2, 1, 8, 6, 4, 2, 8, 10]])
    by_hand = [6 / 8, (6 / 8 * 4 / 6) ** 0.5, (6 / 8 * 4 / 6 * 2 / 4) ** (1 / 3), (6 / 8 * 4 / 6 * 2 / 4 / 2) ** 0.25]
    np.testing.assert_allclose(corpus_bleu(counts)[0], np.array(by_hand) * np.exp(1 - 10 / 8), rtol=1e-6)


def test_the_only_reference_itself_scores_ten() -> None:
    """Specification E3.13."""
    references = [texts[:1] for texts in REFERENCES[:4]]
    assert scores([texts[0] for texts in references], references, "cider")["cider"].value == pytest.approx(10)


def test_case_and_punctuation_do_not_count(java: bool) -> None:
    references = [texts[:1] for texts in REFERENCES[:4]]
    shouted = [texts[0].upper() + "!" for texts in references]
    assert scores(shouted, references, "cider")["cider"].value == pytest.approx(10)


def test_other_peoples_captions_are_chance(java: bool) -> None:
    references = [texts[:1] for texts in REFERENCES[:4]]
    turned = [references[(i + 1) % 4][0] for i in range(4)]
    found = scores(turned, references, "cider")["cider"]
    assert found.value is not None and found.value < 0.5
    right = scores([texts[0] for texts in references], references, "cider")["cider"]
    assert right.chance == pytest.approx(found.value)


def test_words_that_every_image_shares_are_worth_nothing(java: bool) -> None:
    """log(images / images that have it) = 0."""
    references = [[f"photo {texts[0]}"] for texts in REFERENCES]
    assert scores(["photo"] * 5, references, "cider")["cider"].value == pytest.approx(0)


def test_without_java_meteor_and_spice_are_not_applicable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = scores(CAPTIONS, REFERENCES, "meteor", "spice")
    assert all(score.value is None and "not applicable" in score.note for score in found.values())
    assert set(found) == {"meteor", "spice"}


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="1 captions cannot be scored against 5"):
        caption_scores(["a"], REFERENCES)
    with pytest.raises(UserError, match=r"the references of image 1 have no words: \['\?'\]"):
        caption_scores(["a", "b"], [["a"], ["?"]], ("cider",))
