"""The report: drawn from results.json alone, the same every time, and text stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from test_study_results import fake_study

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.plain_json import write_json
from tiedjax.analysis.instruments import SLOW, sections
from tiedjax.analysis.study import beside_paper, sentences
from tiedjax.analysis.study.page import CORE, draw, write_report
from tiedjax.analysis.study.results import summarize
from tiedjax.analysis.study.sections import SCHEMA, SECTIONS, keys, left_out, sections_of, versions
from tiedjax.errors import UserError

SCRIPT = "<script>alert('x')</script>"


def drawn(results: dict, out: Path) -> str:
    write_report(results, out)
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    study, runs = fake_study(steps=[0, 1, 4, 16, 64, 400])
    study = replace(study, slow_instruments=tuple(SLOW))
    found = summarize(study, runs, environment={"device": SCRIPT, "packages": {"jax": "0.0"}, "study_seconds": 240.0})
    found["examples"]["tokens"][0]["token"] = SCRIPT
    found["examples"]["tokens"][1]["token"] = " \n\t$x_1$ &amp;"
    path = tmp_path_factory.mktemp("study") / "results.json"
    write_json(path, found)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def out(results, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    drawn(results, folder)
    return folder


@pytest.fixture(scope="module")
def page(out) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def test_a_script_in_a_token_or_a_device_is_shown_not_run(page):
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 2
    assert "␣⏎⇥$x_1$␣&amp;amp;" in page


def test_the_page_asks_nothing_of_the_network(page):
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#|https://arxiv\.org)[^"']*""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_page_is_well_formed_and_ids_are_unique(page):
    class Balanced(HTMLParser):
        void = {"meta", "link", "br", "img", "hr"}

        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.ids: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.ids += [value for name, value in attrs if name == "id"]
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_startendtag(self, tag, attrs):
            self.ids += [value for name, value in attrs if name == "id"]

    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))


def test_redrawing_from_saved_results_gives_the_same_page(results, page, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red"}):  # whatever the caller's style
        again = drawn(json.loads(json.dumps(results)), tmp_path)
    assert again == page


@pytest.mark.parametrize("section", ["align", "gradients"])  # one has figures of a single panel, one a colour bar
def test_a_figure_is_laid_out_once_and_drawn_once_for_each_format(section, results, tmp_path, monkeypatch):
    laid_out, drawings = [], []
    execute, draw_figure = ConstrainedLayoutEngine.execute, Figure.draw
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *args: laid_out.append(execute(*args)))
    monkeypatch.setattr(Figure, "draw", lambda *args: drawings.append(draw_figure(*args)))
    panels = [len(svgs) for svgs in draw(results, section, tmp_path).values()]
    assert len(drawings) == 2 * len(panels) + sum(panels)  # PNG and PDF of each figure, SVG of each panel
    assert len(laid_out) == len(panels) + sum(n for n in panels if n > 1)


def test_texts_of_the_page_take_its_font(results, tmp_path):
    svgs = [svg for panels in draw(results, "align", tmp_path).values() for svg in panels]
    assert all("<text" in svg for svg in svgs)
    assert not any(re.search(r"font-family|font:", svg) for svg in svgs)


def test_figures_are_files_too(results, out):
    names = {plot.name for section in SECTIONS.values() for plot in section.plots(results)}
    assert names >= {"alignment", "alignment_over_steps", "gradient_share", "gradient_deciles", "evolution", "norms"}
    assert {p.name for p in (out / "figures").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "pdf")}
    for path in (out / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")


def test_the_numbers_of_the_results_are_in_the_page(results, page):
    head = results["headline"]
    assert results["answer"] in page
    for span in (head["vs_output"], head["vs_input"]):
        assert f">{numbers.spread(span)}</td>" in page
    for statement in results["statements"].values():
        assert sentences.margin_of(statement) in page
    for arm in results["arms"].values():
        assert f">{numbers.spread(arm['eval_loss'])}</td>" in page
    assert page.index('<table id="arms">') < page.index("<table>"), "the first table is that of the arms"
    assert sentences.testing(results) in page
    for comparison in results["arms"]["tied"]["alignment"]["shared"].values():
        for cell in comparison.values():
            assert f">{numbers.number(cell['score']['mean'])}</td>" in page
            assert f">{numbers.number(cell['floor']['mean'])}</td>" in page
    assert "0.669" in page  # the paper's, beside ours
    assert "tying.input_grad_scale" in page
    for row in beside_paper.scaling_and_evolution(results):
        assert row["ours"] in page
    assert len(beside_paper.scaling_and_evolution(results)) == 4


def test_the_first_screen_is_verdict_table_picture_and_contents(results, page):
    screen = page[page.index("<main>") : page.index('<details id="sure">')]
    assert screen.count("<table") == screen.count("<figure") == 1
    assert f'<p class="lead">{sentences.verdict(results)}</p>' in screen
    assert 'id="figure-nearness"' in screen
    linked = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', screen)
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)(?: <code>[^<]*</code>)?</h2>', page)
    assert linked == headings
    assert len(linked) == len(re.findall("<h2", page)) > 12
    assert {name for name, _ in linked} >= set(sections())


def test_every_sentence_of_the_answer_has_at_most_three_numbers(results):
    arms = re.compile("|".join(sorted(results["arms"], key=len, reverse=True)))
    for paragraph in sentences.answer(results):
        for sentence in re.split(r"(?<=\.) ", paragraph):
            assert len(re.findall(r"\d+(?:\.\d+)?", arms.sub("", sentence))) <= 3, sentence


def test_every_cell_names_its_column_for_a_narrow_screen(page):
    cells = re.findall(r"<td[^>]*>", page)
    assert len(cells) > 300
    assert not [cell for cell in cells if not re.match(r'<td data-label="[^"<]+"', cell)]


def test_it_is_drawn_from_a_single_run(tmp_path):
    study, runs = fake_study(seeds=(0,), steps=[0, 1, 400])
    found = summarize(study, {("untied", 0): runs["untied", 0]})
    page = drawn(json.loads(json.dumps(found)), tmp_path)
    assert found["answer"] in page
    assert "±" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


def test_results_of_something_else_are_refused(tmp_path):
    with pytest.raises(UserError, match="not the results of a study"):
        write_report({"instrument": "align"}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report({"kind": "study", "schema": SCHEMA} | {key: {} for key in CORE}, tmp_path / "file")
    with pytest.raises(UserError, match="has schema 1, this version draws 3; `tiedjax study` analyses"):
        write_report({"kind": "study", "schema": 1}, tmp_path)


def redrawn(results: dict, out: Path) -> str:
    """The page without its figures, which take long and are another matter."""
    write_report(results, out, drawings={})
    return (out / "report.html").read_text(encoding="utf-8")


LEFT_OUT = (
    "Left out: {}. These results do not hold it in the form that this version draws; `tiedjax study` analyses the "
    "finished runs again."
)


@pytest.mark.parametrize("name", [name for name in SECTIONS if keys(name)])
def test_a_section_that_the_results_lack_is_left_out_with_a_line_unless_it_is_slow(name, results, tmp_path):
    whole = redrawn(results, tmp_path)
    for key in keys(name):
        page = redrawn({k: v for k, v in results.items() if k != key}, tmp_path)
        assert page.count("Left out: ") == (name not in SLOW)
        assert (LEFT_OUT.format(name) in page) == (name not in SLOW)
        assert page.count("<h2") == whole.count("<h2") - 1
    assert "Left out: " not in whole


def test_a_section_of_another_version_is_left_out_and_one_without_a_number_is_of_the_first(results, tmp_path):
    assert results["versions"] == versions()
    older = {k: v for k, v in results.items() if k != "versions"}
    changed = [name for name, number in versions().items() if number != 1]
    assert left_out(older) == [LEFT_OUT.format(name) for name in changed]
    assert set(sections_of(older)) == set(SECTIONS) - set(changed)
    newer = results | {"versions": versions() | {"knn": 99}}
    assert LEFT_OUT.format("knn") in redrawn(newer, tmp_path)
    assert draw(newer, "knn", tmp_path) == {}
    assert list((tmp_path / "figures").iterdir()) == []


@pytest.mark.parametrize("key", CORE)
def test_results_without_their_core_are_refused_with_one_line(key, results, tmp_path):
    line = f"report: results.json holds no '{key}'; `tiedjax study` analyses the finished runs again"
    with pytest.raises(UserError) as error:
        write_report({k: v for k, v in results.items() if k != key}, tmp_path)
    assert str(error.value) == line


def test_numbers_for_people():
    assert numbers.number(-0.0004) == "0.000"
    assert numbers.number(-0.12) == "−0.120"
    assert numbers.number(None) == "–"
    assert numbers.spread({"mean": 0.5, "low": 0.4, "high": 0.6}) == "0.500\u00a0±\u00a00.100"
    assert numbers.spread({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert numbers.percent({"mean": 0.5, "low": None, "high": None}) == "50\u00a0%"
    assert [numbers.duration(s) for s in (None, 42.4, 150, 8000)] == ["–", "42 s", "2 min 30 s", "2 h 13 min"]
    assert numbers.visible("\x00a ") == "�a␣"
