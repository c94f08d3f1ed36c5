"""Held-out loss against bias: which arms lie on the frontier, and what is said and drawn of it."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from test_sentences import N, span

from tiedjax.analysis.study import frontier
from tiedjax.analysis.study.sections import SECTIONS
from tiedjax.config import TyingConfig

ARMS: dict[str, dict[str, Any]] = {  # loss, bias and parameters
    "untied": {"loss": 4.1, "bias": None, "parameters": 200, "tying": {"scheme": "untied"}},
    "tied": {"loss": 4.4, "bias": 0.3, "parameters": 100, "tying": {"scheme": "tied"}},
    "late": {"loss": 4.2, "bias": 0.2, "parameters": 200, "tying": {"untie_at": 0.5}},
    "half": {"loss": 4.5, "bias": -0.1, "parameters": 150, "tying": {"scheme": "partial_dims"}},
    "worse": {"loss": 4.6, "bias": 0.4, "parameters": 150, "tying": {"scheme": "low_rank"}},
}


def results(without: str | None = None) -> dict[str, Any]:
    """Results of these arms; `without` a loss for one of them."""
    roles = {"untied": {}, "tied": "shared", "worse": "shared"}
    arms = {}
    for name, arm in ARMS.items():
        role = roles.get(name, "input")
        margin = {} if arm["bias"] is None else {role: {"orthogonal": span(arm["bias"], 0.01)}, "output": None}
        arms[name] = {"eval_loss": span(None if name == without else arm["loss"], 0.02), "margin": margin}
    head = {"arm": "tied", "reference": "untied", "fit": "orthogonal", "measure": "beyond_frequency"}
    repeated = {"untied": {"input": {"vs_input": {"orthogonal": {"beyond_frequency": span(0.7)}}}}}
    return {
        "headline": head | {"reference_input_vs_output": span(0.6)},
        "between_seeds": repeated,
        "arms": arms,
        "study": {"arms": {name: {"tying": arm["tying"]} for name, arm in ARMS.items()}},
        "runs": [{"arm": name, "parameters": arm["parameters"]} for name, arm in ARMS.items()],
    }


def test_an_arm_is_dominated_by_those_better_in_loss_and_bias_that_are_no_larger() -> None:
    """`half` has a larger loss and bias than untied but fewer parameters; `worse` than tied, with more."""
    dominated = {place.arm: place.dominated_by for place in frontier.places(results())}
    assert dominated == {"untied": (), "late": ("untied",), "tied": (), "half": (), "worse": ("tied", "half")}
    assert list(dominated) == ["untied", "late", "tied", "half", "worse"]


def test_the_references_bias_is_its_two_roles_beside_its_two_seeds() -> None:
    place = frontier.places(results())[0]
    assert place.bias.mean == pytest.approx(0.6 - 0.7)
    assert place.bias.half_width is None
    alone = results() | {"between_seeds": {}}
    assert [place.arm for place in frontier.places(alone)] == ["late", "tied", "half", "worse"]


def test_an_arm_of_the_references_scheme_is_compared_with_other_seeds() -> None:
    """It begins with the reference's own tables, so that its twin says nothing."""
    known = results()
    known["arms"]["again"] = known["arms"]["late"] | {"margin": {"input": {"orthogonal": span(-0.9, 0.01)}}}
    known["study"]["arms"]["again"] = {"tying": {"scheme": "untied"}, "train": {"steps": 7}}
    known["runs"].append({"arm": "again", "parameters": 200})
    of = lambda value: {"orthogonal": {"beyond_frequency": span(value)}}
    known["between_seeds"]["again"] = {"input": {"vs_input": of(0.4), "vs_output": of(0.25)}}
    (place,) = [place for place in frontier.places(known) if place.arm == "again"]
    assert place.bias.mean == pytest.approx(0.25 - 0.4)
    assert place.bias.half_width is None


def test_an_arm_without_a_loss_or_a_size_has_no_place() -> None:
    assert "late" not in [place.arm for place in frontier.places(results(without="late"))]
    unknown = results()
    unknown["runs"][1]["parameters"] = None
    assert "tied" not in [place.arm for place in frontier.places(unknown)]


def test_what_is_said_of_the_frontier() -> None:
    assert frontier.on_it(results()) == (
        "On the frontier: untied, tied, half. No other arm has at once a lower loss, a smaller bias and no more "
        "parameters, by means over seeds."
    )
    assert frontier.on_it(results() | {"arms": {}}) == ""
    assert list(frontier.plots(results() | {"arms": {}})) == []
    rows = [tuple(row.values()) for row in frontier.rows(results())]
    assert rows == [
        ("untied", False, f"4.100{N}±{N}0.020", "−0.100", "200", "–"),
        ("late", True, f"4.200{N}±{N}0.020", f"0.200{N}±{N}0.010", "200", "untied"),
        ("tied", False, f"4.400{N}±{N}0.020", f"0.300{N}±{N}0.010", "100", "–"),
        ("half", False, f"4.500{N}±{N}0.020", f"−0.100{N}±{N}0.010", "150", "–"),
        ("worse", True, f"4.600{N}±{N}0.020", f"0.400{N}±{N}0.010", "150", "tied, half"),
    ]


def test_every_scheme_has_a_marker_of_its_own() -> None:
    schemes = get_args(get_type_hints(TyingConfig)["scheme"])
    assert {*schemes, frontier.CHANGES} == set(frontier.MARKERS)
    assert len(set(frontier.MARKERS.values())) == len(frontier.MARKERS)
    assert list(SECTIONS)[:2] == ["overview", "frontier"]


def test_a_marker_says_the_scheme_its_size_the_parameters_and_grey_that_an_arm_is_dominated() -> None:
    ax = Figure().add_subplot()
    frontier.draw(ax, results())
    drawn = [mesh for mesh in ax.collections if isinstance(mesh, PathCollection)]
    points = [mesh for mesh in drawn if len(mesh.get_offsets())]  # a label of the legend has none
    at = np.array([mesh.get_offsets()[0] for mesh in points])
    np.testing.assert_allclose(at, [(-0.1, 4.1), (0.2, 4.2), (0.3, 4.4), (-0.1, 4.5), (0.4, 4.6)])
    assert [float(mesh.get_sizes()[0]) for mesh in points] == [220, 220, 50, 135, 135]
    faces = [tuple(mesh.get_facecolor()[0]) for mesh in points]
    assert faces[1] == faces[4]
    assert len(set(faces)) == 4
    assert [text.get_text() for text in ax.texts] == ["untied", "late", "tied", "half", "worse"]
    heights = [text.get_position()[1] for text in ax.texts]
    low, high = ax.get_ylim()
    assert np.diff(heights).min() >= (high - low) / 10 - 1e-9
    assert heights == sorted(heights)
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["untied", frontier.CHANGES, "tied", "partial_dims", "low_rank"]
