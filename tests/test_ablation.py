"""The ablation command: its statistics against scipy's, its runner with small jobs, its commands against their parsers.

Nothing is trained here: result files are made up, and what the command then has to run is asked or is nothing.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from scipy import stats
from tiny import change_json

import zs3.ablation.__main__ as command
from benchmarks.made_labels import MadeLabelArgs
from configuration_zs3 import Zs3Config
from zs3 import files
from zs3.ablation import report, runner
from zs3.ablation.jobs import AblationArgs, Job, make_jobs, trainings
from zs3.ablation.statistics import holm, judged, t_interval, verdict
from zs3.ablation.tables import ENSEMBLES, MADE_LABELS, TRAININGS, Row, Sample, make_tables
from zs3.command_line import InputError, read_arguments, run
from zs3.evaluation.arguments import EvalArgs, deciding_flags
from zs3.evaluation.ensemble_weight import WeightArgs, weight_settings
from zs3.pseudo_labels import PseudoLabelArgs
from zs3.scenes.dataset import write_dataset
from zs3.training.arguments import TrainArgs

ROOT = Path(__file__).parent.parent
TABLES = make_tables(clip=True, matching="unpaired")
OLD = [row for name in ("table4", "table5") for row in TABLES[name].rows]
ALL = [row for table in TABLES.values() for row in table.rows]
SCORES = ("miou_seen", "miou_unseen", "hiou")


# ---- the statistics ----------------------------------------------------------------------------------------


def test_the_interval_is_scipys():
    rng = random.Random(0)
    for count in (2, 3, 5):
        values = [rng.gauss(40, 3) for _ in range(count)]
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert t_interval(values) == pytest.approx(tuple(expected))
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)  # 4.303 / sqrt(3), by table


@pytest.mark.parametrize(
    ("differences", "paper", "expected"),
    [
        ([5.0, 6.0, 7.0], 16.7, "same sign as the paper"),
        ([-5.0, -6.0, -7.0], -1.5, "same sign as the paper"),
        ([5.0, 6.0, 7.0], -1.5, "opposite"),
        ([-5.0, -6.0, -7.0], 16.7, "opposite"),
        ([-1.0, 6.0, 7.0], 16.7, "no difference"),  # the mean has the paper's sign, its interval holds 0
        ([0.0, 0.0, 0.0], 16.7, "no difference"),
        ([5.0], 16.7, "no interval"),  # of one seed nothing is known
        ([5.0, 6.0, 7.0], None, "higher"),  # the paper has no such pair
        ([-5.0, -6.0, -7.0], None, "lower"),
        ([-1.0, 6.0, 7.0], None, "no difference"),
    ],
)
def test_verdicts(differences, paper, expected):
    assert verdict(list(t_interval(differences)), paper) == expected


def test_holm_is_its_definition():
    """Holm 1979 in words: reject the smallest p if it is at most level / m, go on with the others and m - 1, stop at
    the first that is not."""
    rng = random.Random(1)
    for _ in range(200):
        ps = [rng.choice([rng.random() ** 4, 0.01, 1.0]) for _ in range(rng.randint(1, 7))]
        level, rejected = rng.choice([0.05, 0.2]), set()
        for left, (p, at) in zip(range(len(ps), 0, -1), sorted(zip(ps, range(len(ps)), strict=True)), strict=True):
            if p > level / left:
                break
            rejected.add(at)
        adjusted = holm(ps)
        for at, p in enumerate(adjusted):
            assert (p <= level) == (at in rejected) or p == pytest.approx(level)


def test_the_verdicts_on_contrasts_that_were_named_before_the_runs():
    clear, none = [9.0, 10.0, 11.0, 10.5], [0.1, -0.1, 0.2, -0.2]
    alone = [5.0, 1.0, 4.0, 1.2]  # p is 0.06
    unsure = [20.0, -15.0, 3.0, 1.0]
    rows = judged([clear, clear, clear, none, alone, unsure], [3.0, -3.0, None, 2.0, 2.0, 2.0])
    assert [row.verdict for row in rows] == [
        "same sign as the paper",
        "opposite",
        "higher",
        "equivalent, within 3 points",
        "not decided",
        "not decided",
    ]
    for row, values in zip(rows, (clear, clear, clear, none, alone, unsure), strict=True):
        assert row.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue) and row.p <= row.holm
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)  # lies within the bound where p is below 0.05
        assert (row.equivalent_p < 0.05) == (low > -3 and high < 3)
    assert judged([[1.0]], [None])[0].verdict == "no interval"
    near = [4.5, -2.5, 3.0, 0.0, 2.5, -1.0, 3.5, -2.0]  # within 3 points, but not when others are asked too
    assert (
        judged([near], [None])[0].equivalent_holm < 0.05 < judged([near] + [unsure] * 5, [None] * 6)[0].equivalent_holm
    )
    a_few, many = judged([[2.0, 4.0, 3.0, 1.5]], [None]), judged([[2.0, 4.0, 3.0, 1.5]] + [unsure] * 5, [None] * 6)
    assert a_few[0].verdict == "higher" and many[0].verdict == "not decided"  # others were asked too


def test_the_papers_numbers_are_those_of_the_paper():
    ours = {name: [tuple(scores) for scores in table.paper.values()] for name, table in TABLES.items()}
    components = [(36.7, 35.2, 35.9), (31.8, 38.9, 35.0), (38.4, 50.1, 43.5), (39.0, 52.2, 44.7)]
    assert ours.pop("table4") == [(37.2, 35.5, 36.4), (38.6, 42.0, 40.2)]
    assert ours.pop("table5") == [(40.1, 25.3, 31.0), (38.6, 42.0, 40.2), (39.0, 52.2, 44.7)]
    assert ours.pop("table6") == ours.pop("confirmatory") == components and not any(ours.values())
    assert list(make_tables(clip=False, matching="joint")["table6"].paper.values()) == components[:3]
    steps = [difference.paper for difference in TABLES["table6"].differences]
    by_hand = [(-4.9, 3.7, -0.9), (6.6, 11.2, 8.5), (0.6, 2.1, 1.2), (2.3, 17.0, 8.8)]
    assert steps[:4] == [pytest.approx(step) for step in by_hand] and steps[4:] == [None]
    ensemble, (pseudo, truth, less) = TABLES["table4"].differences, TABLES["table5"].differences
    assert all(difference.paper == pytest.approx((1.4, 6.5, 3.8)) for difference in ensemble[:-3])
    assert [pair[2] for pair in ensemble[-3:]] == [pair.paper for pair in (pseudo, truth, less)]
    assert all(row.ensemble == "crops" for pair in ensemble[-3:] for row in pair[:2])
    assert pseudo.paper == pytest.approx((-1.5, 16.7, 9.2)) and truth.paper == pytest.approx((-1.1, 26.9, 13.7))
    assert less.paper == pytest.approx((-0.4, -10.2, -4.5))


def test_a_training_is_the_recipe_with_what_its_title_says():
    told = {name: dict(zip(t.flags[::2], t.flags[1::2], strict=True)) for name, t in TRAININGS.items()}
    kept = {"bare_ce": ("ce", "cross_entropy", "0"), "bare_ce_kl": ("ce_kl", None, "0"), "bare_ce_kl_rank": (None,) * 3}
    for bare, (same, loss, rank) in kept.items():
        assert told[bare].pop("--prompt_templates") == "{}" and TRAININGS[bare].start == "stage1_bare"
        assert told[bare] == (told[same] if same else {})
        assert (told[bare].get("--class_loss"), told[bare].get("--rank_weight")) == (loss, rank)
    for name in ("unpaired", "joint", "hybrid"):
        assert told[name] == {"--matching": name}
    assert all(len(told[name]) == 1 for name in ("focal", "kl_u_p", "ignored_negative", "warm"))
    weight = {"--label_map_weight": "2"}
    assert told["label_map"] == weight and told["best"] == told["pseudo_best"] == weight | {"--matching": "hybrid"}
    assert told["label_map_labelled"] == weight | {"--label_map_pixels": "labelled"}
    assert told["best_no_rank"] == told["best"] | {"--rank_weight": "0"}
    assert [name for name, training in TRAININGS.items() if training.unseen_labels == "pseudo"] == [
        "pseudo",
        "pseudo_best",
    ]
    titles = [training.title for training in TRAININGS.values()]
    assert len(set(titles)) == len(titles)


def test_best_is_the_recipe_of_that_name():
    recipes = (f"recipes/scenes_stage2_{name}.yaml" for name in ("ground_truth", "best"))
    paper, ours = (yaml.safe_load((ROOT / name).read_text()) for name in recipes)
    changed = {f"--{name}": str(value) for name, value in ours.items() if paper.get(name) != value}
    assert changed == dict(zip(TRAININGS["best"].flags[::2], TRAININGS["best"].flags[1::2], strict=True))


def test_without_a_clip_no_row_needs_one():
    tables = make_tables(clip=False, matching="joint")
    assert not {"table4", "ensemble_weight", "comparison"} & set(tables)
    assert [row.training for row in tables["table5"].rows] == ["none", "ground_truth"]
    for table in tables.values():
        for row in [*table.rows, *(row for pair in table.differences for row in pair[:2])]:
            assert row.ensemble == "off" and "bare" not in row.training and "pseudo" not in row.training
            assert row in table.rows and "--prompt_templates" not in TRAININGS[row.training].flags


@pytest.mark.parametrize("matching", ["unpaired", "joint", "hybrid"])
def test_the_other_matchings_are_compared_with_the_recipes_own(matching):
    table = make_tables(clip=True, matching=matching)["matching"]
    others = [row.training for row in table.rows[1:]]
    assert table.rows[0] == Row("ground_truth") and {matching, *others} == {"unpaired", "joint", "hybrid"}
    assert len(others) == 2 and f"stage 2 has {matching}" in table.title


def test_the_matching_is_read_from_the_recipe():
    photographs = AblationArgs(stage2="recipes/photographs_stage2.yaml").known_tables["matching"]
    assert [row.training for row in photographs.rows] == ["ground_truth", "unpaired", "hybrid"]


def run_folder(args: AblationArgs, seed: int, name: str) -> Path:
    return Path(args.output_dir, f"seed{seed}", name)


@pytest.fixture
def finished(tmp_path, monkeypatch) -> AblationArgs:
    """An ablation of 3 seeds that has run, with made-up weights and scores; 0 on unseen classes without labels."""
    args = AblationArgs(output_dir=str(tmp_path / "runs"), num_train=2, num_validation=1)
    monkeypatch.chdir(ROOT)
    write_dataset(args.runs[0].data, 2, 1, seed=0)
    rng = random.Random(0)
    for seed in args.seeds:
        for row in TRAININGS:
            (run_folder(args, seed, row) / "final").mkdir(parents=True)
            weights = f"{seed} {row}".encode()
            labels = "ground_truth" if TRAININGS[row].unseen_labels == "ground_truth" else "elsewhere/pseudo_labels"
            asked = WeightArgs(model="elsewhere/final", dataset=str(args.runs[0].data), unseen_labels=labels)
            answer = {"checkpoint_sha256": hashlib.sha256(weights).hexdigest(), "settings": weight_settings(asked)}
            (run_folder(args, seed, row) / "ensemble_weight.json").write_text(json.dumps(answer))
            (run_folder(args, seed, row) / "final" / "model.safetensors").write_bytes(weights)
            for view in ENSEMBLES:
                result = {name: rng.uniform(0.2, 0.6) for name in SCORES}
                areas = [{wrong: rng.uniform(0, 0.2) for wrong in ("wrong_seen", "wrong_unseen")} for _ in range(2)]
                result |= {"seen_unseen_confusion": dict(zip(("of_seen", "of_unseen"), areas, strict=True))}
                if row != "mask2former":  # whose result has no ensemble either
                    alone, area = {"miou_seen": 0.5 + 0.1 * seed}, 0.2 if row == "none" else None
                    result |= {"seen_unseen_curve": {"seen_only": alone, "area": area}}
                    result |= {"clip_ensemble_weight": {"off": None, "chosen": 0.6 if seed else None}.get(view, 0.8)}
                result |= {"unseen": ["heart"], "per_class": {"star": 0.9, "heart": 0.1 * seed}}
                result |= {"miou_unseen": 0.0, "hiou": 0.0} if row == "none" else {}
                result |= {"miou_unseen": 0.4 + 0.05 * seed} if row == "ground_truth" else {}
                result |= {"checkpoint_sha256": hashlib.sha256(weights).hexdigest(), "num_images": 1}
                result |= {"split_images": 1, "settings": settings_of(args, seed, row, view)}
                if view == "chosen":
                    sha256 = hashlib.sha256(json.dumps(answer).encode()).hexdigest()
                    result |= {"given_sha256": {"elsewhere.json": sha256}}
                result |= {"versions": {"torch": "2.13.0" if seed else "2.11.0+cu130", "numpy": "2.4.6"}}
                (run_folder(args, seed, row) / f"gzs3_{view}.json").write_text(json.dumps(result))
        for row in ("pseudo", "ground_truth"):  # ten lines: the first four mean 20 + seed, the last four 5
            rank = [20.0 + seed] * 4 + [10.0] * 2 + [4.0, 6.0, 4.0, 6.0]
            rates = [0.5] * 9 + [0.5 if row == "pseudo" else None]  # of a step without masks there is none
            lines = [{"loss": 99.0, "loss_rank": a, "same_label_rate": b} for a, b in zip(rank, rates, strict=True)]
            path = run_folder(args, seed, row) / "metrics.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_folder(args, seed, "pseudo_labels").mkdir()
        (run_folder(args, seed, "pseudo_labels") / "summary.json").write_text("{}")
        made_by = {"checkpoint_sha256": {"model.safetensors": hashlib.sha256(f"{seed} stage1".encode()).hexdigest()}}
        made_by |= {"unannotated_share": 0.5}
        (run_folder(args, seed, "pseudo_labels") / "settings.json").write_text(json.dumps(made_by))
    return args


def settings_of(args: AblationArgs, seed: int, row: str, view: str) -> dict:
    """As eval.py stamps them."""
    asked = EvalArgs(model=str(run_folder(args, seed, row) / "final"), dataset=str(args.runs[0].data), ensemble="crops")
    if view == "zegformer":
        return deciding_flags(replace(asked, ensemble_weight="0.6667", seen_bias="0.1"))
    if view == "chosen":
        return deciding_flags(replace(asked, ensemble=None, ensemble_weight=f"elsewhere/{row}/ensemble_weight.json"))
    return deciding_flags(replace(asked, ensemble=view, ensemble_weight=None if view == "off" else "0.8"))


def call(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation", *map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command.main()


def flags(args: AblationArgs) -> list[object]:
    return ["--output_dir", args.output_dir, "--num_train", args.num_train, "--num_validation", args.num_validation]


def test_both_tables_of_a_finished_ablation_without_running_anything(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    times = [("seed0/none", 3000.0), ("seed0/none", 2400.0), ("seed0/stage1/gzs3_off", 360.0), ("seed9/none", 9e9)]
    times = [{"job": name, "seconds": seconds, "machine": "a machine"} for name, seconds in times]
    Path(finished.output_dir, "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    call(monkeypatch, "table4", "table5", *flags(finished), "--seeds", 0, 1, 2, "--output", tmp_path / "tables.json")
    result = json.loads((tmp_path / "tables.json").read_text())
    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out
    assert result["command"].startswith("zs3 ablation table4 table5 --output_dir")
    assert result["steps"] == {"stage1": 2000, "none": 500, "pseudo": 500, "ground_truth": 500}
    assert len(result["tables"]["table4"]["rows"]) == 12 and len(result["tables"]["table5"]["rows"]) == 3
    assert (
        "synthetic" in text
        and "stage 1 alone 2000; stage 2, no image labels 2000 + 500" in text
        and "Versions of the evaluations: torch 2.11.0+cu130 and 2.13.0, numpy 2.4.6." in text
    )
    assert result["seconds"] is None and "job-hours" not in text

    def seeds_of(row: str, view: str, name: str) -> list[float]:
        paths = [run_folder(finished, seed, row) / f"gzs3_{view}.json" for seed in (0, 1, 2)]
        return [100 * json.loads(path.read_text())[name] for path in paths]

    for line in result["tables"]["table4"]["rows"]:
        for name in SCORES:
            values = seeds_of(line["training"], line["ensemble"], name)
            assert line["scores"][name]["seeds"] == pytest.approx(values)
            assert line["scores"][name]["mean"] == pytest.approx(sum(values) / 3)
            if any(values):
                expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
                assert line["scores"][name]["interval"] == pytest.approx(list(expected))
    pseudo, truth, _ = result["tables"]["table5"]["differences"]
    for difference, row in ((pseudo, "pseudo"), (truth, "ground_truth")):
        for name in SCORES:
            score = difference["scores"][name]
            above, below = seeds_of(row, "off", name), seeds_of("none", "off", name)
            assert score["seeds"] == pytest.approx([a - b for a, b in zip(above, below, strict=True)])
            test = stats.ttest_rel(above, below)  # the interval holds 0 where the paired test has p >= 0.05
            same_sign = test.statistic * score["paper"] > 0
            told = ("same sign as the paper" if same_sign else "opposite") if test.pvalue < 0.05 else "no difference"
            assert score["verdict"] == told
            assert f"{score['mean']:+.1f} ± " in text and f"| {score['paper']:+.1f} | {told} |" in text
            times = sum(above) / sum(below) if sum(below) else None
            assert score["ratio"] == (None if times is None else pytest.approx(times))
            assert f"| {'-' if times is None else f'{times:.2f}'} | {score['seeds'][0]:+.1f}" in text
    assert truth["scores"]["miou_unseen"]["verdict"] == "same sign as the paper"
    titles = [difference["title"] for table in result["tables"].values() for difference in table["differences"]]
    assert titles[6:8] + titles[11:12] == [
        "stage 2, ensemble on, crops − stage 2",
        "stage 2, ensemble on, single pass − stage 2",
        "stage 2, pseudo labels − stage 2, no image labels",
    ]


def test_the_time_is_told_by_machine_where_every_training_has_left_one(finished, monkeypatch):
    names = [f"seed{seed}/{name}" for seed in (0, 1, 2) for name in ("stage1", "none", "pseudo", "ground_truth")]
    times = [(name, 600.0, "a GPU" if "seed2" in name else "a CPU") for name in names]
    times += [("seed0/none", 2400.0, "a CPU"), ("seed0/none/gzs3_off", 360.0, "a CPU"), ("seed9/none", 9e9, "a CPU")]
    rows = [{"job": name, "seconds": seconds, "machine": machine} for name, seconds, machine in times]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(finished.output_dir, "times.jsonl").write_text(2 * lines)  # as of two machines, joined twice
    call(monkeypatch, "table5", *flags(finished))
    seconds = json.loads(Path(finished.output_dir, "tables.json").read_text())["seconds"]
    assert seconds == {"a CPU": 8 * 600 + 2400 + 360, "a GPU": 4 * 600}
    text = Path(finished.output_dir, "tables.md").read_text()
    assert "loader's process: 2.1 job-hours on a CPU and 0.7 job-hours on a GPU. Versions of" in text


def test_every_table_is_told(finished, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    call(monkeypatch, *TABLES, *flags(finished))
    text = capsys.readouterr().out
    assert all(f"## {table.title}" in text for table in TABLES.values()) and "nan" not in text
    pairs = 3 * sum(len(table.differences) for table in TABLES.values())
    assert f"of the {pairs} differences here, {0.05 * pairs:.0f} would" in text
    assert "| ZegFormer-like, ensemble on, crops, w = 2/3, bias 0.1 | no image labels |" in text
    assert "| stage 1 alone, ensemble as chosen by image labels | no image labels |" in text
    head = "| training | weight chosen, every seed |\n| --- | --- |\n| stage 1 alone | none 0.6 0.6 |\n"
    assert text.count(head) == text.count("weight chosen, every seed") == 1


def test_the_diagnosis_is_what_results_and_logs_say(finished, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report, "scores_figure", lambda tables: tables)
    monkeypatch.setattr(report, "save_figure", lambda tables, path: drawn.append((tables, path)))
    call(monkeypatch, "table5", *flags(finished), "--seeds", 0, 1, 2, "--picture", tmp_path / "tables.png")
    table = json.loads(Path(finished.output_dir, "tables.json").read_text())["tables"]["table5"]
    for row in table["rows"]:
        paths = [run_folder(finished, seed, row["training"]) / "gzs3_off.json" for seed in (0, 1, 2)]
        confusion = [json.loads(path.read_text())["seen_unseen_confusion"] for path in paths]
        wrong = [("of_seen", "wrong_unseen"), ("of_unseen", "wrong_seen"), ("of_unseen", "wrong_unseen")]
        for found, (group, kind) in zip(row["areas"].values(), wrong, strict=True):
            assert found["seeds"] == pytest.approx([100 * one[group][kind] for one in confusion])
        alone, area = row["curve"].values()
        assert alone["seeds"] == pytest.approx([50, 60, 70]) and area["mean"] == (
            20 if row["training"] == "none" else None
        )
        assert list(row["areas"])[0].startswith("seen area") and list(row["areas"])[1] == "unseen area with a seen name"
        assert list(row["unseen_classes"]) == ["heart"] and row["unseen_classes"]["heart"]["mean"] == pytest.approx(10)
    none, pseudo, truth = (row["logged"] for row in table["rows"])
    assert none == {}  # there is no log
    for logged in (pseudo, truth):
        assert list(logged) == ["loss_rank", "same_label_rate"]
        assert logged["loss_rank"]["first"]["seeds"] == [20, 21, 22] and logged["loss_rank"]["last"]["mean"] == 5
    assert truth["same_label_rate"]["last"]["mean"] is None
    text = Path(finished.output_dir, "tables.md").read_text()
    assert "| stage 2, pseudo labels | 21.00 → 5.00 | 0.50 → 0.50 |" in text and "| 0.50 → - |" in text
    assert "| stage 2, no image labels |  |  |" in text and "IoU of heart |" in text and "| 10.0 ± 24.8 |" in text
    ((tables, path),) = drawn
    assert path == tmp_path / "tables.png" and list(tables) == [table["title"]]
    titles = ["stage 2, no image labels", "stage 2, pseudo labels", "stage 2"]
    assert list(tables[table["title"]]) == titles and tables[table["title"]]["stage 2"]["training"] == "ground_truth"


def test_scores_of_groups_are_columns_where_every_result_of_a_row_has_them(finished, monkeypatch):
    name = "miou_seen_on_seen_pixels"
    for row in ("none", "pseudo"):
        for seed in (0, 1, 2) if row == "none" else (0, 1):  # the other one is of an older version
            path = run_folder(finished, seed, row) / "gzs3_off.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {name: 0.6 + 0.01 * seed, "miou_stuff": None}))
    call(monkeypatch, "table5", *flags(finished), "--seeds", 0, 1, 2)
    table = json.loads(Path(finished.output_dir, "tables.json").read_text())["tables"]["table5"]
    assert [list(row["added_scores"]) for row in table["rows"]] == [[name], [], []]
    assert table["rows"][0]["added_scores"][name]["seeds"] == pytest.approx([60, 61, 62])
    lines = Path(finished.output_dir, "tables.md").read_text().splitlines()
    assert any(line.endswith("| mIoU(U) | hIoU | mIoU(S) on seen pixels | the paper's |") for line in lines)
    assert any(line.startswith("| stage 2, no image labels |") and " | 61.0 ± 2.5 | " in line for line in lines)


def test_the_quality_of_image_labels_is_a_column(finished, monkeypatch):
    for seed in (0, 1, 2):
        path = run_folder(finished, seed, "pseudo") / "gzs3_off.json"
        change_json(path, image_label_precision=0.7 + 0.1 * seed, image_label_recall=0.5)
    call(monkeypatch, "table5", *flags(finished), "--seeds", 0, 1, 2)
    lines = Path(finished.output_dir, "tables.md").read_text().splitlines()
    found = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
    (head,) = [cells for cells in found if "recall of image labels" in cells]
    rows = [cells for cells in found if len(cells) == len(head) and cells[1].startswith("stage 2, ")]
    at = head.index("precision of image labels")
    qualities = {cells[1]: cells[at : at + 2] for cells in rows}
    assert qualities["stage 2, pseudo labels"] == ["80.0 ± 24.8", "50.0 ± 0.0"]
    assert qualities["stage 2, no image labels"] == ["", ""]


def test_tables_of_older_versions_are_told_without_them():
    result = json.loads((ROOT / "docs" / "results" / "first_edition" / "scenes_tables.json").read_text())
    text = report.report(result)
    assert "| mIoU(S) | mIoU(U) | hIoU | the paper's |" in text and "on seen pixels" not in text
    assert "recall of image labels" not in text


def test_one_seed_has_no_interval_and_a_missing_class_no_number(finished, monkeypatch):
    path = run_folder(finished, 0, "pseudo") / "gzs3_off.json"
    change_json(path, miou_unseen=None)
    call(monkeypatch, "table5", *flags(finished), "--seeds", 0)
    result = json.loads(Path(finished.output_dir, "tables.json").read_text())["tables"]["table5"]
    assert result["rows"][1]["scores"]["miou_unseen"] == {"mean": None, "interval": [None, None], "seeds": [None]}
    assert {score["verdict"] for d in result["differences"] for score in d["scores"].values()} == {"no interval"}
    text = Path(finished.output_dir, "tables.md").read_text()
    assert "± - (" in text and "| - ± - (-) |" in text and "nan" not in text


# ---- what has to be run ------------------------------------------------------------------------------------


def planned(args: AblationArgs) -> list[str]:
    return [job.name for job in runner.jobs_to_run(make_jobs(args.runs, OLD))]


def test_what_a_row_starts_from_is_trained_too():
    names = trainings(TABLES["table6"].rows)
    assert names == ["stage1", "stage1_bare", "ground_truth", "bare_ce", "bare_ce_kl", "bare_ce_kl_rank", "closed"]
    assert trainings([Row("pseudo")]) == ["stage1", "pseudo"]


def test_an_evaluation_is_repeated_where_the_checkpoint_or_the_weight_is_another(finished):
    assert planned(finished) == []
    (run_folder(finished, 1, "none") / "final" / "model.safetensors").write_bytes(b"trained anew")
    path = run_folder(finished, 2, "pseudo") / "gzs3_crops.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"settings": before["settings"] | {"ensemble_weight": "0.7"}}))
    repeated = [f"seed1/none/gzs3_{view}" for view in ("off", "crops", "single_pass")]
    assert planned(finished) == [*repeated, "seed2/pseudo/gzs3_crops"]
    path.write_text(json.dumps(before | {"split_images": 2}))
    assert planned(finished) == [*repeated, "seed2/pseudo/gzs3_crops"]


def test_a_file_with_a_field_of_a_wrong_type_is_one_line(finished, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    shutil.rmtree(run_folder(finished, 0, "pseudo"))  # or the settings of its labels are not looked at
    for file, changes in (
        ("none/gzs3_off.json", {"miou_seen": True}),
        ("none/gzs3_off.json", {"hiou": "0.5"}),
        ("none/gzs3_off.json", {"unseen": "heart"}),
        ("none/gzs3_off.json", {"per_class": [0.5]}),
        ("none/gzs3_off.json", {"seen_unseen_confusion": {"of_seen": 0.5}}),
        ("none/gzs3_off.json", {"seen_unseen_curve": {"seen_only": {}, "area": 0.5}}),
        ("none/gzs3_off.json", {"seen_unseen_curve": {"seen_only": {"miou_seen": 0.5}, "area": [0.5]}}),
        ("none/gzs3_off.json", {"versions": ["torch"]}),
        ("none/gzs3_off.json", {"settings": 1}),
        ("none/gzs3_off.json", {"given_sha256": ["a"]}),
        ("none/gzs3_off.json", {"num_images": "1"}),
        ("none/gzs3_off.json", {"split_images": None}),
        ("none/gzs3_chosen.json", {"clip_ensemble_weight": "0.6"}),
        ("none/ensemble_weight.json", {"settings": ["model"]}),
        ("none/ensemble_weight.json", {"checkpoint_sha256": 1}),
        ("pseudo_labels/settings.json", {"checkpoint_sha256": "0123"}),
        ("pseudo_labels/settings.json", {"checkpoint_sha256": {"model.safetensors": 1}}),
        ("pseudo_labels/settings.json", {"unannotated_share": "0.5"}),
    ):
        path = Path(finished.output_dir, "seed0", file)
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(InputError) as refused:
            call(monkeypatch, "table5", "ensemble_weight", *flags(finished))
        message = str(refused.value)
        assert path.name in message and next(iter(changes)) in message and len(message) <= 200
        path.write_text(before)


def test_a_truncated_file_is_made_again_with_a_word(finished, capsys):
    """Cut anywhere, a result is one that is not there; the others stay."""
    rows = finished.known_tables["ensemble_weight"].rows
    jobs = {job.name: job for job in [*make_jobs(finished.runs, rows), finished.runs[0].pseudo_label_job()]}
    for file, job in (
        ("none/gzs3_off.json", "none/gzs3_off"),
        ("none/ensemble_weight.json", "none/ensemble_weight"),
        ("pseudo_labels/settings.json", "pseudo_labels"),
    ):
        path, is_done = Path(finished.output_dir, "seed0", file), jobs[f"seed0/{job}"].is_done
        whole = path.read_bytes()
        assert is_done()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert not is_done() and f"{path.name} is no JSON" in capsys.readouterr().out
        path.write_bytes(whole)


def test_half_a_line_of_times_is_left_out(finished, capsys):
    times = Path(finished.output_dir, "times.jsonl")
    times.write_text('{"job": "seed0/none", "seco')
    files.append_line(times, '{"job": "a", "seconds": 2.0, "machine": "m"}')
    assert runner.seconds_by_machine([], times) == {}
    assert "line 1 of" in capsys.readouterr().out


def test_a_result_of_the_ovs_setting_is_no_row(finished, monkeypatch):
    path = run_folder(finished, 0, "none") / "gzs3_off.json"
    change_json(path, seen_unseen_confusion=None)
    with pytest.raises(InputError, match="gzs3_off.json is no result .*, it lacks 'seen_unseen_confusion."):
        call(monkeypatch, "table5", *flags(finished))


def test_a_broken_line_of_a_log_is_one_line(finished, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    for file, line in (
        ("seed0/pseudo/metrics.jsonl", "[1]"),
        ("seed0/pseudo/metrics.jsonl", '{"loss_rank": "1"}'),
        ("seed0/pseudo/metrics.jsonl", '{"loss_rank": [1]}'),
        ("times.jsonl", '{"job": "a", "seconds": "1", "machine": "m"}'),
        ("times.jsonl", '{"job": ["a"], "seconds": 1, "machine": "m"}'),
        ("times.jsonl", '{"job": "a", "seconds": 1}'),
        ("times.jsonl", "[1]"),
    ):
        Path(finished.output_dir, file).write_text(f"{line}\n")
        with pytest.raises(InputError, match=Path(file).name) as refused:
            call(monkeypatch, "table5", *flags(finished))
        assert len(str(refused.value)) <= 200


def delete_weights(args: AblationArgs, seed: str = "*", name: str = "*") -> None:
    for folder in Path(args.output_dir).glob(f"seed{seed}/{name}/final"):
        shutil.rmtree(folder)


def test_results_stand_without_their_weights(finished, monkeypatch):
    delete_weights(finished)
    (run_folder(finished, 1, "pseudo_labels") / "summary.json").unlink()  # what was made of them stands, too
    monkeypatch.setattr(subprocess, "Popen", None)
    (run_folder(finished, 1, "none") / "ensemble_weight.json").unlink()
    call(monkeypatch, "table4", "table5", "ensemble_weight", *flags(finished))
    assert json.loads(Path(finished.output_dir, "tables.json").read_text())["tables"]["table4"]["rows"]


def test_results_stand_where_they_are_moved(finished, monkeypatch, tmp_path):
    recipe = {"output_dir": "elsewhere/seed0/none", "dataset": "elsewhere/scenes", "init_from": "x/stage1/final"}
    recipe |= {"unseen_labels": "none", "max_steps": 500}
    (run_folder(finished, 0, "none") / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    delete_weights(finished)
    Path(finished.output_dir).rename(tmp_path / "moved")
    monkeypatch.setattr(subprocess, "Popen", None)
    moved = flags(replace(finished, output_dir=str(tmp_path / "moved")))
    call(monkeypatch, "table4", "table5", "ensemble_weight", *moved)
    assert (tmp_path / "moved" / "tables.json").exists()


def test_results_of_other_images_are_no_row(finished, monkeypatch):
    path = run_folder(finished, 1, "none") / "gzs3_off.json"
    change_json(path, split_images=2, num_images=2)
    with pytest.raises(InputError, match="none/gzs3_off.json is of 2 validation images and .*scenes has 1"):
        call(monkeypatch, "table5", *flags(finished))


def test_a_missing_result_is_made_by_what_is_there(finished):
    (run_folder(finished, 1, "none") / "gzs3_crops.json").unlink()
    assert planned(finished) == ["seed1/none/gzs3_crops"]
    shutil.rmtree(run_folder(finished, 1, "none"))
    assert planned(finished) == ["seed1/none", *(f"seed1/none/gzs3_{view}" for view in ("off", "crops", "single_pass"))]


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        (
            "none",
            "none/gzs3_crops.json",
            "none/gzs3_crops.json is missing and needs seed1/none/final, .*seed1/none was made .*delete .*/none$",
        ),
        (
            "stage1",
            "stage1/gzs3_off.json",
            "stage1/gzs3_off.json is missing and needs seed1/stage1/final.*seed1/stage1 was made .*/seed1$",
        ),
    ],
)
def test_a_model_that_is_gone_is_not_trained_again_beside_its_old_results(finished, monkeypatch, name, lost, message):
    delete_weights(finished, "1", name)
    (run_folder(finished, 1, name).parent / lost).unlink()
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(InputError, match=message):
        call(monkeypatch, "table4", "table5", *flags(finished))


def test_nor_is_a_stage_1_that_others_started_from(finished, monkeypatch):
    shutil.rmtree(run_folder(finished, 2, "stage1"))
    with pytest.raises(InputError, match="seed2/none was made with it: bring one back, or delete .*/seed2$"):
        call(monkeypatch, "table5", "table4", *flags(finished))


def test_pseudo_labels_of_another_stage_1_or_another_choice_of_proposals_are_made_again(finished):
    shutil.rmtree(run_folder(finished, 0, "pseudo"))
    results = ["seed0/pseudo", *(f"seed0/pseudo/gzs3_{view}" for view in ("off", "crops", "single_pass"))]
    assert planned(finished) == results
    made_with = run_folder(finished, 0, "pseudo_labels") / "settings.json"
    before = json.loads(made_with.read_text())
    for change in ({"checkpoint_sha256": {"model.safetensors": "another"}}, {"unannotated_share": 0.0}):
        made_with.write_text(json.dumps(before | change))
        assert planned(finished) == ["seed0/pseudo_labels", *results]


def test_the_weight_is_chosen_anew_for_another_checkpoint_or_by_other_labels(finished):
    def missing() -> list[str]:
        return [job.name for job in runner.jobs_to_run(make_jobs(finished.runs, TABLES["ensemble_weight"].rows))]

    assert missing() == []
    path = run_folder(finished, 0, "none") / "ensemble_weight.json"
    before = json.loads(path.read_text())
    other = before["settings"] | {"unseen_labels": "ground_truth"}
    for answer in (before | {"settings": other}, {"clip_ensemble_weight": 0.9}):
        path.write_text(json.dumps(answer))
        assert missing() == ["seed0/none/ensemble_weight", "seed0/none/gzs3_chosen"]
    path.write_text(json.dumps(before | {"clip_ensemble_weight": 0.9}))  # another than was evaluated
    assert missing() == ["seed0/none/gzs3_chosen"]
    path.write_text(json.dumps(before))
    (run_folder(finished, 1, "best") / "final" / "model.safetensors").write_bytes(b"trained anew")
    assert missing() == [f"seed1/best/{name}" for name in ("gzs3_off", "ensemble_weight", "gzs3_chosen")]


@pytest.mark.parametrize(
    ("older", "stands"),
    [({"ensemble_weight": 0.8}, True), ({"ensemble_tolerance": 0.0}, True), ({"ensemble_tolerance": 0.1}, False)],
)
def test_a_result_of_an_older_eval_stands_if_it_is_the_same_evaluation(finished, older, stands):
    """An older one kept the weight as a number, and knew a tolerance."""
    path = run_folder(finished, 0, "none") / "gzs3_crops.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"settings": before["settings"] | older}))
    assert planned(finished) == ([] if stands else ["seed0/none/gzs3_crops"])


def test_a_weight_is_chosen_by_what_training_may_know():
    """The true labels where they were told, else pseudo labels, which are made also where no training needs them."""
    rows = [Row(name, "chosen") for name in ("stage1", "none", "ground_truth")]
    jobs = {job.name: job for job in make_jobs(AblationArgs(seeds=[1]).runs, rows)}
    labels = {"stage1": "runs/ablation/seed1/pseudo_labels", "ground_truth": "ground_truth"}
    labels["none"] = labels["stage1"]
    for name, expected in labels.items():
        folder = f"runs/ablation/seed1/{name}"
        words = f"-m zs3 ensemble_weight --model {folder}/final --dataset runs/ablation/scenes "
        words += f"--unseen_labels {expected} --output {folder}/ensemble_weight.json"
        job = jobs[f"seed1/{name}/ensemble_weight"]
        assert job.command[1:] == words.split()
        assert ("seed1/pseudo_labels" in job.after) == (name != "ground_truth")
        evaluation = jobs[f"seed1/{name}/gzs3_chosen"]
        words = f"eval.py --model {folder}/final --dataset runs/ablation/scenes --split validation "
        words += f"--output {folder}/gzs3_chosen.json "
        assert evaluation.command[1:] == f"{words}--ensemble_weight {folder}/ensemble_weight.json".split()
        assert job.name in evaluation.after
    assert "seed1/pseudo_labels" not in {job.name for job in make_jobs(AblationArgs(seeds=[1]).runs, rows[2:])}


def test_a_run_with_other_flags_is_not_taken_for_this_one(finished, monkeypatch, capsys):
    recipe = {"max_steps": 500, "learning_rate": 5e-4, "class_loss": "background_aware", "seed": 0, "of_old": 1}
    path = run_folder(finished, 0, "none") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert command.check_trained(finished.runs[0], "none") == 500
    with pytest.raises(InputError, match=r"seed0/none was made with max_steps 500 \(asked for: 20\): .*none, or"):
        call(monkeypatch, "table5", *flags(finished), "--stage2_steps", 20)
    path.write_text(yaml.safe_dump(recipe | {"class_loss": "cross_entropy"}))
    for _ in range(2):  # also where only its results are left
        with pytest.raises(InputError, match="made with class_loss cross_entropy"):
            call(monkeypatch, "table5", *flags(finished))
        delete_weights(finished)


def test_the_commands_of_scenes():
    jobs = {job.name: job.command for job in make_jobs(AblationArgs().runs, OLD)}
    assert len(jobs) == 3 * (4 + 1 + 12)
    folder = "runs/ablation/seed1"
    stage1 = f"train.py --config recipes/scenes_stage1.yaml --dataset runs/ablation/scenes --output_dir {folder}/stage1"
    assert jobs["seed1/stage1"][1:] == [*stage1.split(), "--seed", "1", "--unseen_labels", "none"]
    pseudo = "train.py --config recipes/scenes_stage2_ground_truth.yaml --dataset runs/ablation/scenes --output_dir "
    pseudo += f"{folder}/pseudo --seed 1 --init_from {folder}/stage1/final --unseen_labels {folder}/pseudo_labels"
    assert jobs["seed1/pseudo"][1:] == pseudo.split()
    labels = f"-m zs3.pseudo_labels --model {folder}/stage1/final --dataset runs/ablation/scenes --output {folder}"
    assert jobs["seed1/pseudo_labels"][1:] == f"{labels}/pseudo_labels".split()


def test_the_commands_of_a_folder_with_vectors_and_a_backbone():
    given = {"stage1": "a.yaml", "stage2": "b.yaml", "text_embeds": "v.npy", "backbone": "bb", "scripts": "bench"}
    args = AblationArgs(dataset="mine", output_dir="out", seeds=[3], **given)  # nothing of this is there
    jobs = {
        job.name: job.command for job in make_jobs(args.runs, make_tables(clip=False, matching="joint")["table6"].rows)
    }
    assert [name for name in jobs if "gzs3" not in name] == [
        *("seed3/stage1", "seed3/ground_truth", "seed3/ce", "seed3/ce_kl", "seed3/closed")
    ]
    stage1 = "-m bench train --config a.yaml --dataset mine --text_embeds v.npy --output_dir out/seed3/stage1 --seed 3"
    assert jobs["seed3/stage1"][1:] == [*stage1.split(), "--backbone", "bb", "--unseen_labels", "none"]
    stage2 = "-m bench train --config b.yaml --dataset mine --text_embeds v.npy --output_dir out/seed3/ce_kl --seed 3"
    assert (
        jobs["seed3/ce_kl"][1:]
        == f"{stage2} --init_from out/seed3/stage1/final --unseen_labels ground_truth --rank_weight 0".split()
    )
    model = "-m bench eval --model out/seed3/ce/final --dataset mine --text_embeds v.npy --split validation --output "
    assert jobs["seed3/ce/gzs3_off"][1:] == f"{model}out/seed3/ce/gzs3_off.json --ensemble off".split()


def test_each_seed_can_have_a_class_split_of_its_own_and_scores_can_be_read_on_test():
    args = AblationArgs(seeds=[2, 5], label_space="scenes:{seed}", split="test")
    evaluations = 0
    for job in make_jobs(args.runs, [*OLD, *TABLES["anchors"].rows]):
        words = job.command
        assert words[words.index("--label_space") + 1] == f"scenes:{job.name[4]}"
        if words[1] == "eval.py":
            assert (
                words[words.index("--split") + 1] == "test" and words[words.index("--output") + 1][-10:] == "_test.json"
            )
            evaluations += 1
    assert evaluations == 2 * len({*OLD, *TABLES["anchors"].rows})


def test_each_seed_can_have_a_dataset_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for seed, count in ((1, 3), (4, 4)):
        write_dataset(tmp_path / "cells" / str(seed), count, 2, seed=seed)
    args = AblationArgs(seeds=[1, 4], dataset=str(tmp_path / "cells" / "{seed}"), output_dir=str(tmp_path / "runs"))
    args.check()
    assert [command.num_images(runs) for runs in args.runs] == [(3, 2), (4, 2)]
    assert command.between([3, 4]) == "3 to 4" and command.between([2, 2]) == 2
    for job in make_jobs(args.runs, OLD):
        assert job.command[job.command.index("--dataset") + 1] == str(tmp_path / "cells" / job.name[4])
    with pytest.raises(InputError, match="cells/2: there is no such folder"):
        replace(args, seeds=[1, 2]).check()


def test_the_plan_is_what_the_command_runs():
    """The page's command, contrasts and steps against the tables and the recipes."""
    page = " ".join((ROOT / "docs" / "evidence_plan.md").read_text(encoding="utf-8").split())
    words = re.search(r"zs3 ablation (confirmatory --seeds .*? docs/results/confirmatory.json)", page).group(1)
    args, _ = read_arguments(AblationArgs, words.replace("\\ ", "").split(), check=False)
    table = TABLES["confirmatory"]
    assert Sample(tuple(args.seeds), args.label_space, args.split) == table.sample and args.num_test == 1000
    told = {row.training: dict(zip(*[iter(TRAININGS[row.training].flags)] * 2, strict=True)) for row in table.rows}
    pairs = [(pair.row, pair.minus) for pair in table.differences]
    changed = [
        {
            name
            for name in told[a.training] | told[b.training]
            if told[a.training].get(name) != told[b.training].get(name)
        }
        for a, b in pairs
    ]
    kl, ranking, prompts, whole = {"--class_loss"}, {"--rank_weight"}, {"--prompt_templates"}, set()
    whole = {*kl, *ranking, *prompts}
    assert changed == [kl, ranking, prompts, set(), whole, {*kl, *ranking}]
    assert [(a.ensemble, b.ensemble) for a, b in pairs] == [("off", "off")] * 3 + [("crops", "off")] + [
        ("off", "off")
    ] * 2
    for stage, steps in {"stage1": 2000, "stage2_ground_truth": 500}.items():
        recipe = yaml.safe_load((ROOT / "recipes" / f"scenes_{stage}.yaml").read_text())
        assert recipe["max_steps"] == steps and f"`recipes/scenes_{stage}.yaml` ({steps} steps)" in page


def test_a_table_of_another_sample_than_the_plans_says_so(finished, monkeypatch, capsys):
    """Three seeds of one class split on validation scenes: tests are shown, but no verdict counts."""
    call(monkeypatch, "confirmatory", *flags(finished))
    printed = capsys.readouterr().out
    assert "**This is not the whole sample of the plan: no verdict counts yet.**" in printed
    result = json.loads(Path(finished.output_dir, "tables.json").read_text())
    table = result["tables"]["confirmatory"]
    assert not table["is_planned_sample"] and all("tests" in pair for pair in table["differences"])
    values = table["differences"][0]["scores"]["hiou"]["seeds"]
    assert table["differences"][0]["tests"]["p"] == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    table["is_planned_sample"] = True
    text = "\n".join(report.contrasts_text(table))
    assert "no verdict counts" not in text and "| p after Holm |" in text and text.count("\n| ") == 2 + 6


def test_every_command_is_understood_by_its_own_parser(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = AblationArgs(stage1_steps=30, stage2_steps=20)
    for job in make_jobs(args.runs, ALL):
        if "mask2former" in job.name:
            assert job.command[1:3] == ["-m", "benchmarks.closed_set"] and job.command[3] in ("train", "eval")
            classes = {"train": (TrainArgs, Zs3Config), "eval": (EvalArgs,)}[job.command[3]]
            asked, _ = read_arguments(classes[0], job.command[4:], *classes[1:])
            assert job.command[3] == "eval" or asked.max_steps == 50  # of both stages
        elif job.command[1] == "train.py":
            training, _ = read_arguments(TrainArgs, job.command[2:], Zs3Config)
            row = job.name.split("/")[1]
            told = "none" if row in ("stage1", "stage1_bare", "none", "closed", "zegformer") else "ground_truth"
            made = row if row in MADE_LABELS else "pseudo" if row.startswith("pseudo") else None
            folder = f"runs/ablation/seed{training.seed}/{made}_labels"
            assert training.unseen_labels == (told if made is None else folder)
            steps = 50 if row == "zegformer" else 30 if TRAININGS[row].start is None else 20
            assert training.max_steps == steps and f"seed{training.seed}" in job.name
        elif job.command[1] == "eval.py":
            evaluation, _ = read_arguments(EvalArgs, job.command[2:], check=False)
            assert evaluation.setting == "gzs3"
            if job.name.endswith("gzs3_chosen"):  # the file that it takes the weight from is not there yet
                assert evaluation.ensemble is None and Path(evaluation.ensemble_weight).name == "ensemble_weight.json"
                continue
            evaluation.check()
            if job.name.endswith("gzs3_zegformer"):
                assert (evaluation.ensemble, evaluation.seen_bias) == ("crops", "0.1")
                continue
            assert evaluation.ensemble_weight == (None if evaluation.ensemble == "off" else "0.8")
            assert job.name.endswith(f"gzs3_{evaluation.ensemble}")
        else:
            words = " ".join(job.command[1:]).split(" --")[0]
            commands = {"-m zs3.pseudo_labels": PseudoLabelArgs, "-m zs3 ensemble_weight": WeightArgs}
            commands |= {"-m benchmarks.made_labels": MadeLabelArgs}
            read_arguments(commands[words], job.command[1 + len(words.split()) :])


def test_a_module_beside_the_package_is_asked_for_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    command.check_scripts(TRAININGS)
    monkeypatch.chdir(tmp_path)
    command.check_scripts(["stage1", "best"])
    with pytest.raises(InputError, match=r"benchmarks/\w+\.py is not here"):
        command.check_scripts(TRAININGS)


def test_what_a_job_reads_another_before_it_makes():
    args, made = AblationArgs(), {}
    for job in make_jobs(args.runs, ALL):
        words = job.command
        for name in ("--init_from", "--unseen_labels", "--model", "--ensemble_weight"):
            if name in words and words[words.index(name) + 1] not in ("none", "ground_truth", "0.8", "0.6667"):
                folder = words[words.index(name) + 1].removesuffix("/final")
                assert made[folder] in job.after
        made[words[words.index("--output" if "--output" in words else "--output_dir") + 1]] = job.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table7"], "no table is called 'table7': the names are table4, table5, table6, matching"),
        (["table5", "--seeds", "1", "1"], "--seeds must be distinct"),
        (["table5", "--num_jobs", "0"], "--num_jobs must be 1 or more"),
        (["--dataset", "photographs"], "--dataset photographs: there is no such folder"),
        (["table5", "--output", "tables.md"], "--output tables.md must be a file that ends in .json"),
        (["table5", "--seed", "1"], "did you mean --seeds"),
    ],
)
def test_bad_flags_are_refused(words, message, call):
    assert message in call(command.main, *words).refusal


def test_scenes_of_another_number_are_refused(finished, monkeypatch):
    with pytest.raises(InputError, match="scenes holds 2 train, 1 validation scenes: delete"):
        call(monkeypatch, "table5", *flags(replace(finished, num_train=3)))


def test_test_scenes_are_drawn_and_counted_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = AblationArgs(output_dir=str(tmp_path / "runs"), num_train=3, num_validation=1, num_test=2, split="test")
    assert command.num_images(args.runs[0]) == (3, 2)
    assert command.num_images(replace(args, split="validation", num_test=0).runs[0]) == (3, 1)  # more do no harm
    with pytest.raises(InputError, match="holds 3 train, 1 validation, 2 test scenes: delete it"):
        command.num_images(replace(args, num_test=4).runs[0])
    with pytest.raises(InputError, match="--split test needs test scenes: give --num_test too"):
        replace(args, num_test=0).check()
    with pytest.raises(InputError, match="no split '12'"):
        replace(args, seeds=[0, 12], label_space="scenes:{seed}").check()


def test_scenes_of_another_edition_are_refused(finished, monkeypatch):
    change_json(finished.runs[0].data / "classes.json", unseen=[])
    with pytest.raises(InputError, match="scenes holds scenes of another edition: delete it"):
        call(monkeypatch, "table5", *flags(finished))


# ---- the runner --------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], processes: int) -> None:
    runner.run_jobs(jobs, processes, jobs[0].log.parent.parent / "times.jsonl")


class Fakes:
    """Jobs that note when they begin and end, and make a file."""

    def __init__(self, folder: Path):
        self.folder, self.notes = folder, folder / "notes"
        self.notes.touch()

    def job(self, name: str, *after: str, seconds: float = 0.15, then: str = "") -> Job:
        note = f"print(time.time(), {name!r}, {{!r}}, file=open({str(self.notes)!r}, 'a'), flush=True)"
        code = ["import sys, time", note.format("begins"), f"time.sleep({seconds})", then, note.format("ends")]
        code.append(f"open({str(self.folder / name)!r}, 'w')")
        command = [sys.executable, "-S", "-c", "\n".join(code)]
        return Job(name, command, self.folder / "logs" / f"{name}.log", (self.folder / name).exists, list(after))

    def events(self) -> list[tuple[str, str]]:
        rows = sorted(line.split() for line in self.notes.read_text().splitlines())
        return [(name, what) for _, name, what in rows]


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path)


def test_jobs_come_after_those_they_wait_for_and_never_more_than_asked(fakes):
    jobs = [fakes.job("a"), fakes.job("b", "a"), fakes.job("c", "a"), fakes.job("d", "a"), fakes.job("e", "b", "d")]
    jobs += [fakes.job("f", "of another table")]
    run_jobs(jobs, processes=2)
    events = fakes.events()
    assert sorted(events) == sorted((name, what) for name in "abcdef" for what in ("begins", "ends"))
    for job in jobs:
        for other in set(job.after) & set("abcdef"):
            assert events.index((other, "ends")) < events.index((job.name, "begins"))
    at_once = [sum(1 if what == "begins" else -1 for _, what in events[: end + 1]) for end in range(len(events))]
    assert max(at_once) == 2


def test_nothing_is_repeated(fakes):
    (fakes.folder / "a").touch()
    run_jobs([fakes.job("a"), fakes.job("b", "a")], processes=1)
    run_jobs([fakes.job("a"), fakes.job("b", "a")], processes=1)
    assert fakes.events() == [("b", "begins"), ("b", "ends")]
    (row,) = map(json.loads, (fakes.folder / "times.jsonl").read_text().splitlines())
    assert row["job"] == "b" and 0.1 < row["seconds"] < 60 and row["machine"] == runner.machine()


def test_a_failure_names_the_log_ends_the_others_and_is_mended(fakes, capsys):
    slow = fakes.job("slow", seconds=60)
    bad = fakes.job("bad", then="sys.exit('error: no such thing')")
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        run(lambda: run_jobs([slow, fakes.job("fine", seconds=0), bad, fakes.job("last", "bad")], processes=3))
    assert stopped.value.code == 2 and time.monotonic() - began < 30
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"error: bad failed with exit code 1, see {bad.log} (error: no such thing); once mended, the same command "
        "goes on from here"
    )
    began_once = [name for name, what in fakes.events() if what == "begins"]
    assert sorted(began_once) == ["bad", "fine", "slow"] and not (fakes.folder / "slow").exists()
    run_jobs([fakes.job("slow"), fakes.job("fine"), fakes.job("bad"), fakes.job("last", "bad")], processes=2)
    assert [name for name, what in fakes.events() if what == "begins"].count("fine") == 1
    assert (fakes.folder / "last").exists() and "no such thing" in bad.log.read_text()  # logs go on


def test_a_job_without_a_result_has_failed(fakes):
    job = replace(fakes.job("a"), is_done=lambda: False)
    with pytest.raises(InputError, match="a ended without its result, see .*a.log"):
        run_jobs([job], processes=1)


def test_a_job_left_by_a_killed_command_is_not_started_twice(fakes):
    """kill -9 gives the command no time to end its jobs."""
    job = fakes.job("a", seconds=60)
    orphan = runner.start(job)
    try:
        with pytest.raises(InputError, match="a is running already, it writes .*a.log"):
            run_jobs([job], processes=1)
        assert orphan.poll() is None
    finally:
        orphan.kill()
        orphan.wait()
    run_jobs([fakes.job("a")], processes=1)
    assert (fakes.folder / "a").exists()


def test_a_job_has_one_thread(fakes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    then = f"import os; open({str(fakes.folder / 'threads')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run_jobs([fakes.job("a", seconds=0, then=then)], processes=1)
    assert (fakes.folder / "threads").read_text() == "1" and os.environ["OMP_NUM_THREADS"] == "7"
