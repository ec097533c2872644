"""Curves: what is drawn where, read off matplotlib's own objects."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.test_calibration import IGNORE, map_of, map_with_confidence
from zs3.command_line import InputError
from zs3.evaluation.curves import check_matplotlib, draw_curves, reliability_figure, scores_figure, seen_unseen_figure
from zs3.files import write_json
from zs3.scores.calibration import Reliability, SeenBiasCurve


def curve(shift: float = 0.3) -> dict:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 500)
    seen, unseen = np.where(label == 0, 0.6, 0.3), np.where(label == 1, 0.6, 0.3)
    seen, unseen = seen + rng.random(500) * 0.5 + shift, unseen + rng.random(500) * 0.5
    counts = SeenBiasCurve([True, False], IGNORE)
    counts.update(map_of([0] * 500, seen.tolist(), [1] * 500, unseen.tolist()), label[None])
    return counts.result()


def reliability() -> dict:
    counts = Reliability(IGNORE)
    confidence = np.array([[0.9] * 30 + [0.5] * 10])
    counts.update(map_with_confidence(np.zeros((1, 40), dtype=int), confidence), np.array([[0] * 24 + [1] * 16]))
    return counts.result()


def drawn_points(figure: Figure, marker: str) -> list[tuple[float, float]]:
    lines = [line for line in figure.axes[0].lines if line.get_marker() == marker and len(line.get_xdata())]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


def test_the_curve_runs_from_seen_only_to_unseen_only_in_percent_with_its_points_marked():
    result, chosen = curve(), {"gamma": 0.2, "miou_seen": 0.31, "miou_unseen": 0.47, "hiou": 0.4}
    figure = seen_unseen_figure("ours", result, chosen)
    line = figure.axes[0].lines[0]
    points = result["points"]
    for name, drawn in (("miou_unseen", line.get_xdata()), ("miou_seen", line.get_ydata())):
        expected = [result["seen_only"][name], *points[name], result["unseen_only"][name]]
        np.testing.assert_allclose(drawn, 100 * np.array(expected))
    for name, marker in (("unbiased", "o"), ("best", "*"), ("chosen", "D")):
        point = chosen if name == "chosen" else result[name]
        found = [100 * point["miou_unseen"], 100 * point["miou_seen"]]
        assert drawn_points(figure, marker) == [pytest.approx(found)]
    (entry, shaded, *markers) = [text.get_text() for text in figure.legends[0].get_texts()]
    best = result["best"]
    assert f"ours, area {100 * result['area']:.1f} %" in entry and "chosen 40.0 (bias 0.2)" in entry
    assert f"best {100 * best['hiou']:.1f} (bias {best['gamma']:.3g})" in entry
    assert shaded.startswith("shaded: ") and markers == ["best hIoU", "no bias", "chosen bias"]


def test_the_shaded_area_is_the_area_said():
    result = curve()
    figure = seen_unseen_figure("ours", result)
    (shade,) = figure.axes[0].collections
    x, y = shade.get_paths()[0].vertices.T
    assert abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2 / 1e4 == pytest.approx(result["area"], abs=1e-9)


def test_bars_show_accuracy_and_share_of_the_pixels():
    above, below = reliability_figure(reliability()).axes
    accuracy = {(round(bar.get_x(), 3), round(bar.get_height(), 3)) for bar in above.patches}
    assert accuracy == {(round(100 * 13 / 15, 3), 80.0), (round(100 * 7 / 15, 3), 0.0)}
    shares = {(round(bar.get_x(), 3), round(bar.get_height(), 3)) for bar in below.patches}
    assert shares == {(round(100 * 13 / 15, 3), 75.0), (round(100 * 7 / 15, 3), 25.0)}
    assert all(bar.get_width() == pytest.approx(100 / 15) for bar in [*above.patches, *below.patches])
    assert "20.0 %" in above.get_title()  # 0.75 x 0.1 + 0.25 x 0.5


def test_markers_of_one_place_lie_within_each_other():
    result = curve()
    lone = result["best"]
    figure = seen_unseen_figure("ours", result | {"unbiased": lone}, lone)
    drawn = {line.get_marker(): line for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    radius = {
        shape: line.get_markersize() / 2 for shape, line in drawn.items()
    }  # of the least circle around, of D within
    assert radius["*"] < radius["o"] < radius["D"]
    assert {shape for shape, line in drawn.items() if line.get_markerfacecolor() != "none"} == {"*"}


def test_no_legend_lies_over_the_bars():
    figure = reliability_figure(reliability())
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert sorted(text.get_text() for text in legend.get_texts()) == ["accuracy", "as accurate as confident"]


def test_pictures_are_pngs_and_take_results_read_back_from_a_file(tmp_path):
    result = {"model": "ours", "calibration": {"seen_bias": 0.2}, "miou_seen": 0.31, "miou_unseen": 0.47, "hiou": 0.4}
    write_json(tmp_path / "a.json", result | {"seen_unseen_curve": curve(), "reliability": reliability()})
    draw_curves(json.loads((tmp_path / "a.json").read_text()), tmp_path / "deep")
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == ["reliability.png", "seen_unseen_curve.png"]
    for file in (tmp_path / "deep").iterdir():
        picture = Image.open(file)
        assert picture.format == "PNG" and min(picture.size) > 600
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_what_was_not_measured_is_not_drawn(tmp_path):
    nothing = {"seen_unseen_curve": SeenBiasCurve([True, False], IGNORE).result(), "reliability": None}
    for reliability in (None, Reliability(IGNORE).result()):
        draw_curves(nothing | {"reliability": reliability, "calibration": {"seen_bias": 0.0}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_lie_in_the_row_of_their_line_and_the_column_of_their_score():
    def line(start: float, paper: float | None) -> dict:
        names = ("miou_seen", "miou_unseen", "hiou")
        scores = {name: {"seeds": [start + n, start + n + 4], "mean": start + n + 2} for n, name in enumerate(names)}
        return {"scores": scores, "paper": paper and {name: paper + n for n, name in enumerate(names)}}

    tables = {"one": {"a": line(10, 50), "b": line(20, None)}, "two": {"c": line(30, 60)}}
    axes = scores_figure(tables).axes
    assert [own.get_title(loc="left") for own in axes] == ["one", "", "", "two", "", ""]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["a", "b"]
    assert axes[0].get_ylim()[0] > axes[0].get_ylim()[1]  # the first line on top
    for number, own in enumerate(axes):
        n, found = number % 3, {}
        for drawn in own.lines:
            for x, y in zip(drawn.get_xdata(), drawn.get_ydata(), strict=True):
                found.setdefault((drawn.get_marker(), y), []).append(x)
        if number < 3:
            assert found == {("o", 0): [10 + n, 14 + n], ("|", 0): [12 + n], ("D", 0): [50 + n]} | {
                ("o", 1): [20 + n, 24 + n], ("|", 1): [22 + n]
            }  # fmt: skip
        else:
            assert found == {("o", 0): [30 + n, 34 + n], ("|", 0): [32 + n], ("D", 0): [60 + n]}
    assert [own.get_xlabel() for own in axes[3:]] == ["mIoU(S) (%)", "mIoU(U) (%)", "hIoU (%)"]


def test_without_matplotlib_the_mend_is_named(monkeypatch):
    check_matplotlib("--curves")
    monkeypatch.setattr("zs3.evaluation.curves.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'--curves needs matplotlib: pip install -e "\.\[figures\]"'):
        check_matplotlib("--curves")
