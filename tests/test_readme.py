"""The README's own commands, in its own order, with short overrides."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zs3.results import TOLD

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())  # wherever its lines are broken
RESULTS = ROOT / "docs" / "results"
DEMO = "--num_train 12 --num_validation 2 --stage1_steps 2 --stage2_steps 2 --num_pictures 1"
SHORT = {
    "train.py": ["--max_steps", "2"],
    "eval.py": ["--max_images", "1"],
    "zs3.scenes": ["--train", "12", "--validation", "1"],
    "zs3.ensemble_weight": ["--num_images", "2"],
    "zs3.figure": ["--worst", "1"],
}


TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of what the commands need, so that the test leaves no runs/ behind."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("zs3", "recipes", "hub_cards", "train.py", "eval.py", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*_zs3.py"):
        (folder / path.name).symlink_to(path)
    return folder


def execute(command: str | list[str], folder: Path) -> str:
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, shell=isinstance(command, str), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_demo_the_python_and_the_export_work(workplace):
    assert "make demo\n" in blocks("bash")[0]
    # What `make demo` runs once .venv is there; the installation itself is what `make test` has just done.
    make = ["make", "--no-print-directory", "-n", "demo", f"DEMO={DEMO}"]
    recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.splitlines() if "zs3.demo" in line]
    command = command.replace(".venv/bin/python", sys.executable)
    printed = execute(command, workplace)
    assert "report.md" in printed.splitlines()[-3]
    assert (workplace / "runs/demo/report.md").exists() and (workplace / "runs/demo/own_labels.png").exists()
    printed = execute([sys.executable, "-c", "\n".join(blocks("python"))], workplace)  # each goes on from the last
    (found,) = re.findall(r"^\{'.*'\}$", printed, re.MULTILINE)  # by the checkpoint in the repository
    assert set(re.findall(r"'(.*?)'", found)) == {"sky", "grass", "red circle", "red square"}
    assert re.search(r"\(96, 96\) \['sky', 'grass'", printed) and "[96, 96]" in printed
    assert "words that repeat: 1" in printed and printed.splitlines()[-1] in ("sky", "grass", "water", "red square")
    assert (workplace / "runs/demo/overlay.png").exists()
    lines = "\n".join(blocks("python", TRAINING)).replace("max_steps=100", "max_steps=2, report_to='none'")
    assert re.search(r"^\d+\.\d+$", execute([sys.executable, "-c", lines], workplace), re.MULTILINE)  # eval_loss
    assert (workplace / "runs/trainer/merged/model.safetensors").exists()
    (export,) = [block for block in blocks("bash") if "zs3.export" in block]
    execute(export, workplace)
    assert (workplace / "runs/demo/zs3.pt2").exists()


def test_the_commands_of_training_evaluation_and_release_work(workplace):
    lines = [
        line for block in blocks("bash") if "train.py" in block or "eval.py" in block for line in block.splitlines()
    ]
    for line in lines:
        for name, short in SHORT.items():
            if name in line:
                line = " ".join([line, *short])
        printed = execute(line, workplace)
    assert (workplace / "runs/stage2/gzs3.json").exists() and len(list((workplace / "runs/figures").iterdir())) == 1
    assert "model.safetensors" in printed and (workplace / "runs/release/zs3-scenes/README.md").exists()


def test_the_comparison_of_the_readme_is_that_of_the_result_file():
    path = RESULTS / "zs3-scenes_compare.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [result["scores"][name] for name in ("miou_seen", "miou_unseen", "hiou")]
    for side in ("a", "b"):
        assert " / ".join(f"{100 * row[side]:.1f}" for row in rows) in PROSE.replace(" | ", " / ")
    low, high = (f"{100 * bound:.1f}" for bound in rows[2]["interval"])
    assert f"{100 * rows[2]['difference']:.1f} points" in PROSE and f"{low} to {high} over images" in PROSE


ABLATIONS = [RESULTS / f"{name}.json" for name in ("scenes_tables", "scenes_choices", "photographs_tables")]


def test_the_tables_of_the_readme_are_those_of_the_result_files():
    tables = [table for path in ABLATIONS for table in json.loads(path.read_text(encoding="utf-8"))["tables"].values()]
    told = re.findall(r"^\| .* ± .* \|$", README, re.MULTILINE)
    expected = set()
    for row in (row for table in tables for row in table["rows"]):
        halves = [
            (row["scores"][n], np.ptp(row["scores"][n]["interval"]) / 2) for n in ("miou_seen", "miou_unseen", "hiou")
        ]
        cells = " | ".join(f"{score['mean']:.1f} ± {half:.1f}" for score, half in halves)
        expected.add(f"| {row['title']} | {TOLD[row['told']]} | {cells} |")
    assert len(told) == 24 and set(told) <= expected


def test_the_tables_of_the_evidence_are_those_of_the_result_files():
    rows = re.findall(r"^\| .*[±→].* \|$", (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = [path.with_suffix(".md").read_text(encoding="utf-8").splitlines() for path in ABLATIONS]
    assert len(rows) > 60 and set(rows) <= {line for lines in there for line in lines}


def test_the_ratios_of_the_readme_are_those_of_the_result_files():
    cost = json.loads((RESULTS / "clip_views.json").read_text(encoding="utf-8"))["cost"]
    seconds = {row["way"]: row["seconds"] for row in cost}
    one_pass, loop = seconds["single pass"], seconds["loop over crops"]
    assert f"took {one_pass:.2f} s where a loop over 100 crops took {loop:.2f} s" in PROSE
    _, one, two = json.loads((RESULTS / "pseudo_labels.json").read_text(encoding="utf-8"))["rows"]
    told = f"made {one['times_faster_than_loop']:.2f} times as fast as by a loop over crops, and two processes were "
    assert told + f"{two['times_faster_than_first']:.2f} times as fast as one" in PROSE


def test_the_network_of_the_readme_is_that_of_the_result_files():
    told = {}
    for name, network in (("network", "zs3"), ("train_step", "zs3, the same losses")):
        rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
        row = next(row for row in rows if row["backbone"] == "resnet50" and row["size"] == 512)
        assert row.get("norms", "frozen") == "frozen"
        told[name] = row["networks"][network]
    forward, step = told["network"], told["train_step"]
    words = f"a forward {forward['times_faster']:.2f} times as fast with {forward['peak_share']:.2f} of the memory, "
    words += f"a training step {step['times_faster']:.2f} times with {step['peak_share']:.2f}"
    assert words in PROSE


def test_the_loader_of_the_readme_is_that_of_the_result_file():
    rows = json.loads((RESULTS / "loader.json").read_text(encoding="utf-8"))["results"]
    small, large = [row for row in rows if row["loader"] == "1 process, map-style"]
    assert f"makes {small['samples_per_second']:.1f} samples of 640 x 640 a second" in PROSE
    assert f"640 x 480, {small['times_faster']:.2f} times" in PROSE
    assert f"3200 x 2400, {large['times_faster']:.2f} times" in PROSE
    memory = [row["mib_end"] / row["mib_half"] for row in rows if "mib_end" in row]
    assert max(memory) < 1.1  # "flat"


def test_the_label_stage_of_the_readme_is_that_of_the_result_file():
    rows = json.loads((RESULTS / "label_count.json").read_text(encoding="utf-8"))["rows"]
    rows = {(row["labels"], row["size"], row["method"]): row for row in rows if row["kind"].startswith("like")}
    told = re.findall(r"^\| (\d+), (\d+) x \d+ \| (.+) \| (.+) \|$", README, re.MULTILINE)
    assert len(told) == 4
    for labels, size, *cells in told:
        for method, cell in zip(("transformers' Mask2Former post-processing", "semantic_map"), cells, strict=True):
            row = rows[int(labels), int(size), method]
            if "seconds" in row:
                assert cell == f"{row['seconds']:.2f} s, {row['peak_mib']:.0f} MiB"
            else:
                assert cell == f"would need {row['bytes_needed'] / 1e9:.0f} GB"


def test_the_evaluator_of_the_readme_is_that_of_the_result_file():
    result = json.loads((RESULTS / "evaluator.json").read_text(encoding="utf-8"))
    shares = {}
    for row in result["times"]:
        shares.setdefault(row["maps"], []).append(100 * row["share_of_inference"])
    assert {f"{share:.1f}" for share in shares["objects"]} == {"0.2"} and "takes 0.2 % of the inference" in PROSE
    assert f"rejection {max(shares['objects, with counters']):.1f} % or less" in PROSE
    scored = sorted(f"{share:.0f}" for share in shares["objects, with counters and scores"])
    assert f"takes {' to '.join(scored)} % of an" in PROSE
    held = {}
    for row in (row for row in result["memory"] if row["way"] == "ConfusionMatrix"):
        held.setdefault(row["classes"], []).append((row["images"], row["held_mib"] * 1024))
    growth = [(after - before) / (images - fewer) for (fewer, before), (images, after) in held.values()]
    assert {f"{kib:.1f}" for kib in growth} == {"0.8"} and "about 0.8 KiB an image" in PROSE
    assert f"take {result['bootstrap']['seconds']:.1f} seconds" in PROSE


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", README)
