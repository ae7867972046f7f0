"""The report: every section, valid HTML, nothing fetched, small enough to send."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from altsight.evals.base import Result
from altsight.methods import METHODS
from altsight.study.figures import Log, loss_figures, probe_figure
from altsight.study.gallery import Gallery, HeldOut, ImageQuery, Rebuilt, TextQuery
from altsight.study.plan import SourceConfig
from altsight.study.report import licences, render
from altsight.study.result import StudyResult, load_study, save_study
from tests.study.made import absent, accuracy, arm, hits, plan, study

VOID = {"meta", "link", "br", "img", "input", "hr"}
SECTIONS = ["verdict", "results", "curves", "pictures", "retrieval", "certificate", "collapse", "run"]


class Page(HTMLParser):
    """Reads the page, minding that every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.style = ""
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[str(self.tags[-1][1].get("id"))] = data
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "WEBP")
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def made_study() -> StudyResult:
    meter = Result("pets", "collapse", "std", 0.9, note="collapsed: all images get nearly the same features")
    return study(
        arm("untrained", (accuracy(hits(40)), absent(), meter)),
        arm("mae", (accuracy(hits(150)), absent(), meter)),
        arm("clip", (accuracy(hits(150, 9)), accuracy(hits(200), evaluator="zeroshot"), meter)),
        arm("supervised", (accuracy(hits(390)), absent(), meter)),
    )


def logs() -> list[Log]:
    def lines(offset: float) -> tuple[dict[str, float], ...]:
        trained = [{"samples": 64.0 * i, "flops": 1e6 * i, "loss": offset / i, "loss/a": 1.0} for i in range(1, 11)]
        return (*trained, {"samples": 640.0, "flops": 1e7, "probe/pets/top1": 0.25})

    start = {"samples": 0.0, "flops": 0.0, "probe/pets/top1": 0.125}
    return [Log("mae", 0, lines(1.0)), Log("clip", 0, lines(5.0)), Log("untrained", 0, (start,))]


def gallery() -> Gallery:
    one = picture()
    return Gallery(
        task="pets",
        images=(HeldOut(one, ("a <b>cat</b>",)),),
        rebuilt={"mae": (Rebuilt(one, one),), "mug": (Rebuilt(one, one),)},
        captions={"mug": ("a dog & more",), "coca": ("a written caption",)},
        by_text={"clip": (TextQuery("a cat", ((one, "a cat", True), (one, "a dog", False))),)},
        by_image={"clip": (ImageQuery(one, ("a cat",), (("a cat", True), ("a dog", False))),)},
    )


@pytest.fixture(scope="module")
def html() -> str:
    return render(made_study(), logs(), gallery())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    found = Page()
    found.feed(html)
    found.close()
    return found


def test_is_well_formed_with_unique_ids(page: Page) -> None:
    assert page.open == []
    assert max(Counter(page.attributes("id")).values()) == 1


def test_has_all_sections_and_a_contents_list_that_leads_to_them(page: Page) -> None:
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == SECTIONS
    assert [href for href in page.attributes("href") if href.startswith("#")] == [f"#{name}" for name in SECTIONS]


def test_fetches_nothing(page: Page) -> None:
    links = page.attributes("src") + page.attributes("href") + page.attributes("srcset")
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in page.style and "@import" not in page.style
    assert not any(tag in ("iframe", "object", "embed", "base") for tag, _ in page.tags)


def test_is_small_and_carries_plotly_once(html: str) -> None:
    assert len(html.encode()) < 8_000_000
    assert html.count("Copyright 2012") == 1


def test_is_accessible(page: Page) -> None:
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    assert [attrs.get("name") for tag, attrs in page.tags if tag == "meta"] == [None, "viewport"]


def test_names_ties_reasons_and_references(page: Page, html: str) -> None:
    assert "not separable at 95 %" in page.text
    assert "not applicable: this encoder has no text tower" in page.text
    assert html.count('aria-label="best"') == 2  # once in the main table, once among all metrics
    assert "supervised reference" in page.text
    assert "mae: collapsed: all images get nearly the same features." in page.text
    assert "altsight study plan.toml" in page.text


def test_captions_of_methods_that_rebuild_nothing_are_shown(page: Page) -> None:
    assert "coca says" in page.text and "a written caption" in page.text and "coca sees" not in page.text


def test_escapes_captions(html: str) -> None:
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html and "a dog &amp; more" in html
    assert "<b>cat" not in html


def test_every_plot_has_its_data(page: Page) -> None:
    names = page.attributes("data-figure")
    assert names == ["figure-probe", "figure-loss-0", "figure-loss-1"]
    for name in names:
        data: dict[str, Any] = json.loads(page.scripts[name])
        for axis in ("samples", "flops"):
            assert [len(x) for x in data["x"][axis]] == [len(trace["y"]) for trace in data["traces"]]


def test_probe_curves_start_at_the_untrained_encoder() -> None:
    figure = probe_figure(made_study(), logs())
    assert figure is not None
    assert [trace["name"] for trace in figure.traces] == ["mae", "clip"]
    assert figure.traces[0]["y"] == [12.5, 25.0]
    assert figure.x == {"samples": [[0.0, 640.0]] * 2, "flops": [[0.0, 1e7]] * 2}


def test_no_two_arms_of_a_study_of_all_methods_look_alike() -> None:
    of = plan(methods=tuple(name for name in METHODS if name != "supervised"))
    result = study(*(arm(name, of=of) for name in of.arms), of=of)
    figure = probe_figure(result, [Log(name, 0, logs()[0].lines) for name in of.arms])
    assert figure is not None
    looks = [(t["marker"]["color"], t["marker"]["symbol"], t["line"]["dash"]) for t in figure.traces]
    assert len(set(looks)) == len(looks) == len(METHODS)


def test_a_flat_probe_gets_no_stretched_axis() -> None:
    flat = [Log("mae", 0, tuple({"samples": 1.0, "flops": 1.0, "probe/pets/top1": v} for v in (0.50, 0.501)))]
    figure = probe_figure(made_study(), flat)
    assert figure is not None
    low, high = figure.layout["yaxis"]["range"]
    assert high - low >= 10


def test_a_loss_with_a_floor_is_shown_above_it() -> None:
    lines = tuple({"samples": 64.0 * i, "flops": 1.0 * i, "loss": 3.0 + i, "floor": 2.5 + i} for i in range(1, 9))
    figure = loss_figures(made_study(), [Log("mae", 0, lines)])[0]
    assert figure.title == "Loss of mae, above its targets' entropy"
    assert figure.traces[0]["y"] == [0.5] * 8


def test_long_logs_are_thinned_and_keep_their_end() -> None:
    lines = tuple({"samples": float(i), "flops": float(i), "loss": float(i)} for i in range(1, 5001))
    figure = loss_figures(made_study(), [Log("mae", 0, lines)])[0]
    assert 300 <= len(figure.traces[0]["y"]) <= 600
    assert figure.traces[0]["y"][-1] == 5000.0


def test_a_study_without_pictures_probes_or_results_still_reports() -> None:
    found = Page()
    found.feed(render(study(arm("mae"), arm("clip")), [], Gallery()))
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == SECTIONS
    for words in ("Nothing has been evaluated", "No online probe", "None of the methods reconstructs"):
        assert words in found.text


def test_an_unfair_study_is_said_to_be_one() -> None:
    found = render(study(arm("mae"), arm("clip", initial_encoder="2f2f")), [], Gallery())
    assert "Not like for like." in found


def test_sample_data_come_with_their_licence() -> None:
    source = SourceConfig("samples:clipart/train")
    sentences = licences(plan(source=source))
    assert len(sentences) == 1
    assert sentences[0].startswith("clipart/: ") and "public domain" in sentences[0]
    assert licences(plan()) == []


def test_study_json_brings_the_study_back(tmp_path: Any) -> None:
    found = study(*made_study().arms, directory=tmp_path)
    save_study(found)
    assert load_study(tmp_path) == found
