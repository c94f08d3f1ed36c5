"""Everything that the report says and labels, word for word, from results in which every number names what it is of.

`small_study.txt` is the page as text, a line for each heading, paragraph and row of a table; `small_study_figures.txt`
each panel's title, axes, and what each label stands beside. Whoever changes a sentence changes it there too, and reads
the numbers beside it: `python tests/test_sections_in_words.py` writes both files.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))  # where it is run as a program
from small_study import complete, small_study

from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.instruments.alignment import section as alignment
from tiedjax.analysis.instruments.calibration import section as calibration
from tiedjax.analysis.instruments.contribution import section as contribution
from tiedjax.analysis.instruments.cooccurrence import section as cooccurrence
from tiedjax.analysis.instruments.lens import section as lens
from tiedjax.analysis.instruments.norms import section as norms
from tiedjax.analysis.instruments.norms.norms import Curve
from tiedjax.analysis.instruments.regret import section as regret
from tiedjax.analysis.study.page import page_of
from tiedjax.analysis.study.sections import SECTIONS

PAGE = Path(__file__).with_name("small_study.txt")
FIGURES = Path(__file__).with_name("small_study_figures.txt")
N = "\u00a0"  # a no-break space


def page_text(results: dict[str, Any]) -> str:
    """The page as text: a line for each block, cells of a row between bars."""
    body = page_of(results, {}).split("<main>")[1].split("</main>")[0]
    body = re.sub(r"</t[dh]>\s*<t[dh]", " | <td", body)
    body = re.sub(r"\s+|<br>", " ", body)
    body = re.sub(r"<(?:p|h\d|tr|li|summary|dt|pre|thead|tbody|section|details|nav)\b[^>]*>", "\n", body)
    lines = [html.unescape(re.sub("<[^>]*>", "", line)).strip() for line in body.split("\n")]
    return "\n".join(line for line in lines if line) + "\n"


def figures_text(results: dict[str, Any]) -> str:
    """Every panel: title, axes, tick labels that are words, and the values beside each label of its legend."""
    lines = []
    for section in SECTIONS.values():
        for plot in section.plots(results):
            for panel in plot.panels:
                ax = Figure().add_subplot()
                panel(ax, results)
                lines += [f"{plot.name}: {ax.get_title(loc='center') or ax.get_title(loc='left')}"]
                lines += [f"  x {ax.get_xlabel()}; y {ax.get_ylabel()}"]
                ticks = [tick.get_text() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_ticklabels()]
                ticks = [" ".join(tick.split()) for tick in ticks if re.search("[a-z]", tick)]
                lines += [f"  ticks {', '.join(ticks)}"] if ticks else []
                lines += [f"  {line}" for line in drawn(ax)]
    return "\n".join(lines) + "\n"


def drawn(ax: Any) -> list[str]:
    """What is drawn on axes: each line, band and row of points with its label and its values."""
    written = lambda values: " ".join(f"{v:.4g}" for v in np.ravel(np.asarray(values, np.float64)))
    lines = []
    for line in ax.lines:
        label = line.get_label() if not line.get_label().startswith("_") else "-"
        face = "hollow" if line.get_markerfacecolor() == "none" else "filled"
        lines.append(f"{label} [{line.get_color()} {face} {line.get_linestyle()}]: {written(line.get_ydata())}"
                     f" at {written(line.get_xdata())}")  # fmt: skip
    for patch in ax.patches:
        bar = (patch.get_y(), patch.get_x(), patch.get_width()) if hasattr(patch, "get_width") else ()
        values = patch.get_data().values if hasattr(patch, "get_data") else bar
        lines.append(f"{patch.get_label()} [{'filled' if patch.get_fill() else 'hollow'}]: {written(values)}")
    for mesh in ax.collections:
        values = mesh.get_array()
        lines += [] if values is None else [f"colours: {written(values)}"]
    labels = [box.get_label() for box in ax.containers]  # of points with bars
    lines += [f"with bars: {', '.join(labels)}"] if labels else []
    others = [other.get_ylabel() for other in ax.figure.axes if other is not ax]
    notes = [f"{text.get_text()} at {text.xy[0]:.4g}" for text in ax.texts if hasattr(text, "xy")]
    return [*lines, *(f"beside it: {label}" for label in others), *([f"notes: {', '.join(notes)}"] if notes else [])]


def test_the_page_word_for_word() -> None:
    assert page_text(small_study()).splitlines() == PAGE.read_text(encoding="utf-8").splitlines()


def test_the_figures_word_for_word() -> None:
    assert figures_text(small_study()).splitlines() == FIGURES.read_text(encoding="utf-8").splitlines()


def test_the_note_on_early_training_stands_before_the_verdict_and_goes_with_its_reason() -> None:
    results = small_study()
    note, lead = '<p class="warning" role="note">Early training: ', '<p class="lead">'
    page = page_of(results, {})
    assert page.count('role="note"') == 1
    assert page.index("<h1>") < page.index(note) < page.index(lead)
    assert page_text(results).count("(early training)") == 4 + 6  # headings with their links, statements
    results["arms"]["tied-x5"]["hurdles"]["less_bigram"] = few(-0.001, 0.3)
    page = page_of(results, {})
    assert "early training" not in page.lower()
    assert 'role="note"' not in page


def test_every_statement_has_the_name_of_its_claim() -> None:
    """`statements` of results.json: scripts read them by name."""
    assert list(small_study()["statements"]) == [
        "tied_nearer_output",
        "tied_output_dominates_early",
        "tied-x5_nearer_output",
        "tied-x5_lowers_vs_output",
        "tied-x5_raises_vs_input",
        "untied_costs_loss",
        "tied-x5_costs_loss",
        "tied_shares_more_with_output",
        "tied-x5_shares_more_with_output",
        "tied_lens_farther_at_0",
        "tied_lens_worse_at_0",
        "tied_lens_farther_at_1",
        "tied_lens_worse_at_1",
        "tied_block_1_costs_less",
        "tied_block_1_adds_less",
        "tied_frequent_central",
        "tied_underpredicts_rare",
        "tied_overconfident_on_frequent",
        "tied_follows_output_cooccurrence",
    ]


def test_the_numbers_of_the_headline_and_of_the_changes_stand_under_their_roles() -> None:
    results = small_study()
    head, uncontrolled = results["headline"], results["headline"]["frequency_not_controlled"]
    nearness = [head["vs_output"], head["vs_input"], uncontrolled["vs_output"], uncontrolled["vs_input"]]
    assert [round(span["mean"], 3) for span in nearness] == [31.223, 31.213, 21.223, 21.213]
    assert round(head["reference_input_vs_output"]["mean"], 3) == 31.112
    changes = results["changes"]["tied-x5"]
    assert [round(changes[f"vs_{role}"]["orthogonal"]["mean"], 3) for role in ("output", "input")] == [-0.15, 0.1]


def test_results_without_histograms_of_rows_are_drawn_with_a_line_that_says_so() -> None:
    new, old = small_study(), small_study()
    for record in old["comparisons"]:
        del record["histogram"]
    names = [{plot.name for plot in SECTIONS["align"].plots(results)} for results in (new, old)]
    assert names[0] - names[1] == {"alignment_rows"}
    assert "These results have no histogram of single rows; tiedjax study analyses again." in page_text(old)


# ---- What the small study does not come to


def test_what_each_regulariser_wrote_has_a_column_a_bar_and_a_place_in_the_text() -> None:
    """Of arms that have it; the others' cells are dashes."""
    results = small_study()
    for record in results["account"]:
        if record["arm"] == "tied-x5":
            for shares in (record["shares"], *record["strata"].values(), record["early"]):
                shares["regularisers"] = {"cosine": 0.064, "anchor": 0.031}
            for change in record["changes"]:
                change["regularisers"] = {"cosine": 0.000128, "anchor": 0.000512}
    text, before = page_text(results).splitlines(), page_text(small_study()).splitlines()
    new = [line for line in text if line not in before]
    starts = ("Adam, not the gradient", "Tokens | ", "all | ", "Steps | Lookup", "1–20 | ")
    rows = [next(line for line in new if line.startswith(start)) for start in starts]
    assert "what the output role’s gradient wrote, what each regulariser wrote, and decay;" in rows[0]
    assert "the five shares sum to 1" in rows[0]
    assert rows[1] == "Tokens | Initial table | Input role | Output role | Cosine regulariser | Anchor regulariser"
    assert rows[2].endswith(" | – | –")
    assert rows[3].endswith(" | Decay | Cosine regulariser | Anchor regulariser | Body")
    assert rows[4].count(" | – | – | ") == 1
    assert any(line.startswith("all | ") and line.endswith(" | 0.064 ± 0.000 | 0.031 ± 0.000") for line in new)
    assert sum(" | 0.13 ± 0.00 | 0.51 ± 0.00 | " in line for line in new) == 3
    assert any(" The cosine regulariser wrote 6.4" in line for line in new)
    assert any(" The anchor regulariser wrote 3.1" in line for line in new)
    drawn_new = set(figures_text(results).splitlines()) - set(figures_text(small_study()).splitlines())
    for share in ("0.064", "0.031"):
        assert len([line for line in drawn_new if share in line]) == 4


def test_a_table_of_an_arm_with_two_is_named_with_its_role() -> None:
    """Of an arm that is not the reference."""
    results = small_study()
    alike, repeated = results["arms"]["tied"]["alignment"]["shared"], results["between_seeds"]["tied"]["shared"]
    results["arms"] = {"loose": results["arms"]["tied"] | {"alignment": {"input": alike, "output": alike}}}
    results["between_seeds"] = {"loose": {"input": repeated}}
    results["comparisons"] = [
        record | {"arm": "loose", "subject_role": "output"}
        for record in results["comparisons"]
        if record["arm"] == "tied"
    ]
    assert [group["title"] for group in alignment.alignment_groups(results)] == [
        "loose input table and the untied output table",
        "loose input table and the untied input table",
        "loose output table and the untied output table",
        "loose output table and the untied input table",
        "loose input table and the untied output table of another seed",
        "loose input table and the untied input table of another seed",
    ]
    tables = [row["tables"] for row in alignment.strata_rows(results)]
    assert tables == ["loose output and untied input", "loose output and untied output"]
    ax = Figure().add_subplot()
    next(alignment.plots(results)).panels[0](ax, results)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "loose input to untied output",
        "loose input to untied input",
        "loose output to untied output",
        "loose output to untied input",
    ]


def few(mean: float | None, half: float | None) -> dict[str, Any]:
    """An interval as JSON."""
    ends = (None, None) if mean is None or half is None else (mean - half, mean + half)
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": 3, "confidence": 0.95}


@pytest.mark.parametrize(
    ("seeds", "place"),
    [
        ([-0.3, -0.31], "nearer to the mean row"),
        ([0.3, 0.31], "farther from the mean row"),
        ([-0.3, 0.31], "neither measurably nearer to the mean row nor farther from it"),
        ([-0.3], "nearer to the mean row, by one seed,"),
        ([0.3], "farther from the mean row, by one seed,"),
        ([], "at a distance that could not be measured"),
    ],
)
def test_where_frequent_tokens_lie(seeds: list[float], place: str) -> None:
    results = small_study()
    template = next(record for record in results["norms"] if record["arm"] == "tied")
    results["norms"] = [
        template | {"distance_to_mean": complete(Curve, {"spearman": {"score": rho}})} for rho in seeds or [None]
    ]
    size = "–" if not seeds else "±" if len(seeds) > 1 else f"{seeds[0]:.3f}".replace("-", "−")
    sentence = norms.centrality(results)
    assert sentence.startswith(f"Compared with rare tokens, frequent ones lie {place} in tied (")
    assert size in sentence
    assert sentence.endswith("(in brackets: the rank correlation of that distance with the count).")


def test_nothing_is_said_of_norms_that_nobody_measured() -> None:
    assert norms.centrality(small_study() | {"norms": []}) == ""


@pytest.mark.parametrize(
    ("divergence", "sentence"),
    [
        (few(0.5, 0.2), f"is higher than untied’s by 0.500{N}±{N}0.200 bits"),
        (few(-0.5, 0.2), f"is lower than untied’s by 0.500{N}±{N}0.200 bits"),
        (few(-0.1, 0.2), f"differs from untied’s by −0.100{N}±{N}0.200 bits, undecided"),
        (few(-0.1, None), "differs from untied’s by −0.100 bits (one seed)"),
    ],
)
def test_how_a_lens_differs_from_the_twin(divergence: dict[str, Any], sentence: str) -> None:
    results = small_study()
    twin = next(record for record in results["lens"]["twins"] if record["arm"] == "tied" and record["state"] == 1)
    results["lens"]["twins"] = [twin | {"tuned_kl": divergence, "tuned_cross_entropy": few(0.7, 0.1)}]
    assert lens.sentences(results) == [
        f"After layer 1, the tied lens’s divergence {sentence} and its cross-entropy is higher than untied’s by "
        f"0.700{N}±{N}0.100 bits."
    ]


def test_early_layers_that_do_not_differ_and_one_seed() -> None:
    results = small_study()
    for name, statement in results["statements"].items():
        statement["verdict"] = "undecided" if "_lens_" in name else statement["verdict"]
    assert lens.verdict(results) == [
        "In the first third (input and layer 1), tied lenses are nowhere measurably farther from the final prediction "
        "than those of the untied twins, and nowhere measurably behind at the next token by more than in the end."
    ]
    results["statements"]["tied_lens_farther_at_0"]["verdict"] = "the opposite"
    assert "tied lenses are nearer to it at input than those" in lens.verdict(results)[0]
    results["lens"]["twins"][0]["tuned_kl"] = few(0.1, None)
    assert lens.verdict(results) == []


@pytest.mark.parametrize(
    ("cost", "added", "sentences"),
    [
        (
            few(0.5, 0.2),
            few(-0.7, 0.1),
            (
                f"Skipping block 1 costs tied more than untied, by 0.500{N}±{N}0.200 bits a held-out token.",
                f"Block 1 of tied adds less than untied’s, by 0.700{N}±{N}0.100 times the norm of what it reads.",
            ),
        ),
        (
            few(-0.5, 0.2),
            few(-0.1, 0.3),
            (
                f"Skipping block 1 costs tied less than untied, by 0.500{N}±{N}0.200 bits a held-out token.",
                "Whether block 1 of tied adds more or less than untied’s is undecided: the difference is "
                f"−0.100{N}±{N}0.300 times the norm of what it reads.",
            ),
        ),
        (
            few(0.1, 0.2),
            few(0.7, None),
            (
                "Whether skipping block 1 costs tied more or less than untied is undecided: the difference is "
                f"0.100{N}±{N}0.200 bits a held-out token.",
                "Block 1 of tied adds more than untied’s, by 0.700 times the norm of what it reads (one seed).",
            ),
        ),
        (
            few(-0.5, None),
            few(None, None),
            (
                "Skipping block 1 costs tied less than untied, by 0.500 bits a held-out token (one seed).",
                "Whether block 1 of tied adds more or less than untied’s could not be measured.",
            ),
        ),
    ],
)
def test_how_an_early_block_differs_from_the_twins(
    cost: dict[str, Any], added: dict[str, Any], sentences: tuple[str, str]
) -> None:
    results = small_study()
    twins = [twin for twin in results["blocks"]["twins"] if twin["arm"] == "tied"]
    for twin in twins:
        twin["whole"] = {"added": added, "skip_cost": cost} if twin["early"] else twin["attention"]
    assert tuple(contribution.answers(results)) == sentences


@pytest.mark.parametrize(
    ("seeds", "tension", "sentences"),
    [
        (
            [0.3, 0.31],
            few(0.2, 0.1),
            (
                f"With a table for each role a held-out token then costs 0.305{N}±{N}0.064 nats less: the tension "
                "between the roles.",
                f"That is 0.200{N}±{N}0.100 nats more than the same re-fit saves the untied twin.",
            ),
        ),
        (
            [-0.3, -0.31],
            few(-0.2, 0.1),
            (
                f"With a table for each role a held-out token then costs 0.305{N}±{N}0.064 nats more, not less.",
                f"That is 0.200{N}±{N}0.100 nats less than the same re-fit saves the untied twin.",
            ),
        ),
        (
            [-0.3, 0.31],
            few(-0.1, 0.2),
            (
                f"Whether a table for each role then saves anything is undecided: 0.005{N}±{N}3.875 nats a held-out "
                "token.",
                "Whether that is more than the same re-fit saves the untied twin is undecided: the difference is "
                f"−0.100{N}±{N}0.200 nats.",
            ),
        ),
        (
            [0.3],
            few(-0.1, None),
            (
                "With a table for each role a held-out token then costs 0.300 (one seed) nats less: the tension "
                "between the roles.",
                "That is 0.100 (one seed) nats less than the same re-fit saves the untied twin.",
            ),
        ),
    ],
)
def test_what_the_tie_costs(seeds: list[float], tension: dict[str, Any], sentences: tuple[str, str]) -> None:
    results = small_study()
    record = next(run for run in results["regret"]["runs"] if run["arm"] == "tied")
    runs = []
    for mean in seeds:
        both = record["regrets"]["both"] | {"held_out": record["regrets"]["both"]["held_out"] | {"mean": mean}}
        runs.append(record | {"regrets": record["regrets"] | {"both": both}})
    results["regret"] = {"runs": runs, "twins": [{"arm": "tied", "both": tension}]}
    assert tuple(regret.answers(results)[1:3]) == sentences


TWIN = "than its untied twin"


@pytest.mark.parametrize(
    ("overconfidence", "model", "size"),
    [
        (few(0.5, 0.2), f"the tied model is more confident {TWIN}", f"0.500{N}±{N}0.200"),
        (few(-0.5, 0.2), f"the tied model is less confident {TWIN}", f"−0.500{N}±{N}0.200"),
        (few(0.1, None), f"the tied model is more confident {TWIN}, by one seed,", "0.100"),
        (few(-0.1, None), f"the tied model is less confident {TWIN}, by one seed,", "−0.100"),
        (few(0.1, 0.2), "the tied model’s difference to its untied twin is undecided", f"0.100{N}±{N}0.200"),
        (few(None, None), "there is nothing to compare between the tied model and its untied twin", "–"),
    ],
)
def test_how_confident_the_tied_model_is(overconfidence: dict[str, Any], model: str, size: str) -> None:
    results = small_study()
    twins = {twin["stratum"]: twin for twin in results["calibration"]["twins"] if twin["arm"] == "tied"}
    twins["frequent"]["overconfidence"] = overconfidence
    twins["rare"]["log2_ratio"] = few(-0.3, 0.1)
    assert calibration.answers(results) == [
        f"Where it bets on a frequent token, {model} relative to how often it is right ({size}).",
        f"Rare tokens as a whole: the tied model gives them less probability {TWIN} relative to how often they come "
        f"(log2 ratio −0.30{N}±{N}0.10).",
    ]


def test_what_a_table_follows() -> None:
    results = small_study()
    words = {}
    for name, seeds in {"up": [0.3, 0.31], "down": [-0.3, -0.31], "both": [-0.3, 0.31], "one": [0.3]}.items():
        record = results["cooccurrence"][0]
        results["cooccurrence"] = [record | {"difference": complete(Interval, {"mean": mean})} for mean in seeds]
        words[name] = cooccurrence.rows(results)[0]["verdict"]
    assert words == {"up": "what precedes", "down": "what follows", "both": "neither", "one": "not known"}


if __name__ == "__main__":
    PAGE.write_text(page_text(small_study()), encoding="utf-8")
    FIGURES.write_text(figures_text(small_study()), encoding="utf-8")
