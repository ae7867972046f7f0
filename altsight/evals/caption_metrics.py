"""How close captions are to their references: BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE (specification D11).

All are computed by pycocoevalcap over the whole set at once: words count by their rarity in it (CIDEr), and statistics
are summed over it (BLEU, METEOR). Never score a set in parts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.evals.bootstrap import LEVEL, RESAMPLES, interval

CaptionMetric = Literal["bleu", "rouge_l", "cider", "meteor", "spice"]
METRICS: tuple[CaptionMetric, ...] = ("bleu", "rouge_l", "cider", "meteor", "spice")
NON_STANDARD = "words by a Python tokenizer, since Java is missing: not comparable with published figures"
Texts = dict[int, list[str]]
"""Image -> its tokenized references, or the list of its one caption: what pycocoevalcap takes."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A metric over a whole set, with its bootstrap interval over images; None where it is not applicable.

    chance: the same captions, each scored against the references of the image after its own.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    note: str = ""


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[CaptionMetric] = METRICS
) -> list[Score]:
    """Return the scores of one caption an image against that image's references.

    Captions and references go through the PTB tokenizer, as in the COCO evaluation, or where Java is missing through
    one that lower-cases and strips punctuation, and the notes say so. CIDEr lies between 0 and 10: papers print it
    times 100.

    Raises:
        UserError: pycocoevalcap is missing, the numbers do not match, or an image has no reference with a word.
    """
    if len(captions) != len(references) or not captions:
        raise UserError(f"{len(captions)} captions cannot be scored against {len(references)} sets of references.")
    scorers = {name: _SCORERS[name] for name in metrics}
    pycocoevalcap("cider", "cider", "Cider")
    tokenize, note = (ptb, "") if _has_java() else (plain, NON_STANDARD)
    said = {image: [text] for image, text in enumerate(tokenize(captions))}
    flat = iter(tokenize([text for texts in references for text in texts]))
    truth = {image: [next(flat) for _ in texts] for image, texts in enumerate(references)}
    for image, texts in truth.items():
        if not any(texts):
            raise UserError(f"the references of image {image} have no words: {list(references[image])}.")
    found = [score for scorer in scorers.values() for score in scorer(truth, said)]
    return [replace(score, note="; ".join(filter(None, (score.note, note)))) for score in found]


def ptb(texts: Sequence[str]) -> list[str]:
    """Return the words of each text by Stanford's PTB tokenizer, lower-cased and without punctuation.

    The same as pycocoevalcap's, which would write a file into its own folder.

    Raises:
        UserError: Java does not run it.
    """
    wrapper = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = Path(str(wrapper.__file__)).with_name(wrapper.STANFORD_CORENLP_3_4_1_JAR)
    program = ["-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    done = subprocess.run(["java", *program, "-preserveLines", "-lowerCase"], input=lines.encode(), capture_output=True)
    words = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(words) != len(texts):
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"Java does not run the PTB tokenizer ({reason}): mend it, or take it off the PATH.")
    return [" ".join(word for word in line.split() if word not in wrapper.PUNCTUATIONS) for line in words]


def plain(texts: Sequence[str]) -> list[str]:
    """Return the words of each text, lower-cased and without punctuation, by a rule of our own."""
    return [" ".join(re.findall(r"\w+", text.lower())) for text in texts]


def corpus_bleu(counts: Array) -> Array:
    """Return BLEU-1 ... 4 (R, 4) of R sets from their summed counts (R, 10).

    counts: clipped matches and numbers of n-grams for n = 1 ... 4, words of the captions, and words of the references
    that are closest in length. The two small constants are pycocoevalcap's.
    """
    matches, guesses, words, closest = counts[:, :4], counts[:, 4:8], counts[:, 8:9], counts[:, 9:10]
    precisions = (matches + 1e-15) / (guesses + 1e-9)
    means = np.exp(np.log(precisions).cumsum(axis=1) / np.arange(1, 5))
    ratio = (words + 1e-15) / (closest + 1e-9)
    return means * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _bleu(truth: Texts, said: Texts) -> Iterator[Score]:
    counts = _bleu_counts(truth, said)
    values, _ = pycocoevalcap("bleu", "bleu", "Bleu")(4).compute_score(truth, said, verbose=0)
    chances = corpus_bleu(_bleu_counts(truth, _moved(said)).sum(axis=0, keepdims=True))[0]
    draw = key(0, 0, "bootstrap").generator()
    even = np.full(len(counts), 1 / len(counts))
    # One at a time: a matrix of all resamples would grow with the set.
    sums = np.stack([draw.multinomial(len(counts), even) @ counts for _ in range(RESAMPLES)])
    lows, highs = np.quantile(corpus_bleu(sums), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    for n in range(4):
        yield Score(f"bleu{n + 1}", float(values[n]), float(lows[n]), float(highs[n]), float(chances[n]))


def _bleu_counts(truth: Texts, said: Texts) -> Array:
    """Return what BLEU sums over images (n, 10); see `corpus_bleu`."""
    scorer = pycocoevalcap("bleu", "bleu_scorer", "BleuScorer")(n=4)
    for image, texts in truth.items():
        scorer += (said[image][0], texts)
    rows = []
    for found in scorer.ctest:
        closest = min((abs(length - found["testlen"]), length) for length in found["reflen"])[1]
        rows.append([*found["correct"], *found["guess"], found["testlen"], closest])
    return np.array(rows, dtype=np.float64)


def _rouge(truth: Texts, said: Texts) -> Iterator[Score]:
    yield _mean("rouge_l", pycocoevalcap("rouge", "rouge", "Rouge")(), truth, said)


def _cider(truth: Texts, said: Texts) -> Iterator[Score]:
    yield _mean("cider", pycocoevalcap("cider", "cider", "Cider")(), truth, said)


def _mean(metric: str, scorer: Any, truth: Texts, said: Texts) -> Score:
    """Return a metric that is the mean of a score an image."""
    _, scores = scorer.compute_score(truth, said)
    chance, _ = scorer.compute_score(truth, _moved(said))
    found = interval(scores)
    return Score(metric, found.value, found.low, found.high, float(chance))


def _meteor(truth: Texts, said: Texts) -> Iterator[Score]:
    if not _has_java():
        yield Score("meteor", None, note="not applicable: METEOR needs Java")
        return
    value, _ = pycocoevalcap("meteor", "meteor", "Meteor")().compute_score(truth, said)
    yield Score("meteor", float(value), note="no interval: it is computed from sums over the whole set")


def _spice(truth: Texts, said: Texts) -> Iterator[Score]:
    wrapper = pycocoevalcap("spice", "get_stanford_models", "get_stanford_models").__globals__
    models = Path(wrapper["SPICEDIR"]) / wrapper["SPICELIB"] / f"{wrapper['JAR']}-models.jar"
    if not (_has_java() and models.is_file()):
        yield Score("spice", None, note="not applicable: SPICE needs Java and the models that pycocoevalcap fetches")
        return
    _, scores = pycocoevalcap("spice", "spice", "Spice")().compute_score(truth, said)
    found = interval([score["All"]["f"] for score in scores])
    yield Score("spice", found.value, found.low, found.high)


_SCORERS: dict[CaptionMetric, Callable[[Texts, Texts], Iterator[Score]]] = {
    "bleu": _bleu,
    "rouge_l": _rouge,
    "cider": _cider,
    "meteor": _meteor,
    "spice": _spice,
}


def _moved(said: Texts) -> Texts:
    """Return the captions, each given to the image before its own."""
    return {image: said[(image + 1) % len(said)] for image in said}


def _has_java() -> bool:
    return shutil.which("java") is not None


def pycocoevalcap(folder: str, module: str, name: str) -> Any:
    """Return `name` of a module of pycocoevalcap.

    Raises:
        UserError: it is not installed.
    """
    try:
        return getattr(import_module(f"pycocoevalcap.{folder}.{module}"), name)
    except ModuleNotFoundError:
        raise UserError("caption metrics need pycocoevalcap: `pip install 'altsight[captions]'`.") from None
