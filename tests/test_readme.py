"""The commands and numbers of the README and the docs: the commands run in the pages' order, with short overrides."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from tiny import tiny_mask2former

from benchmarks import ratios
from configuration_zs3 import Zs3Config
from zs3.__main__ import COMMANDS
from zs3.command_line import read_arguments
from zs3.evaluation.arguments import EvalArgs
from zs3.training.arguments import TrainArgs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROSE = {name: " ".join(page.split()) for name, page in PAGES.items()}  # wherever its lines are broken
DEMO = "--num_train 12 --num_validation 2 --stage1_steps 2 --stage2_steps 2 --num_pictures 1"
SHORT = {
    "train.py": ["--max_steps", "2"],
    "eval.py": ["--max_images", "1"],
    "scenes": ["--num_train", "12", "--num_validation", "1", "--num_test", "0"],
    "ensemble_weight": ["--num_images", "2"],
    "figure": ["--worst", "1"],
}
IMAGE_LABELS = {
    "none": "no image labels",
    "pseudo": "pseudo image labels",
    "ground_truth": "ground-truth image labels",
}
# The README's names of rows, and the titles in the result files; then words of the evidence for words of the files.
README_ROWS = {
    "transformers' Mask2Former": "transformers' Mask2Former",
    "stand-in for zsseg, with the ensemble": "closed: CE and background, joint matching, ensemble on, crops",
    "the paper's method, without the ensemble": "stage 2, pseudo labels",
    "the same, with this project's options": "hybrid matching, label map loss, pseudo labels",
}
SHORTER = {
    "nothing told": "no image labels",
    "closed: CE and background, joint matching": "stage 1 continued",
    "ensemble as chosen by image labels": "chosen ensemble",
    "ensemble on, crops": "ensemble",
}
# Runs commands one after the other, each in a copy of a process that has imported what takes most of the time.
FORK = """
import json, os, runpy, sys

import accelerate, datasets, modeling_zs3

for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = words
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {words}")
"""


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of what the commands need, so that the test leaves no runs/ behind."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("zs3", "recipes", "hub_cards", "train.py", "eval.py", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*_zs3.py"):
        (folder / path.name).symlink_to(path)
    # Folders with the names of the Hub ids that `zs3 assemble` joins, and a photograph.
    tiny_mask2former().save_pretrained(folder / "facebook" / "mask2former-swin-large-coco-panoptic")
    (folder / "google").mkdir()
    (folder / "google" / "tipsv2-l14").symlink_to(ROOT / "zs3" / "scenes_tipsv2")
    Image.effect_noise((70, 50), 80).convert("RGB").save(folder / "photo.jpg")
    return folder


def assembling(page: str = "README") -> list[str]:
    """The lines of a page that join published parts."""
    return [line for block in blocks("bash", page) for line in block.splitlines() if line.startswith("zs3 assemble")]


def execute(command: list[str], folder: Path) -> str:
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def words_of(line: str) -> list[str]:
    """A command line as it is run: `zs3` is this Python's, and what takes long is made short."""
    words = shlex.split(line)
    (name,) = [word for word in words if word in SHORT] or [None]
    words += SHORT.get(name, [])
    return [sys.executable, "-m", *words] if words[0] == "zs3" else words


def execute_all(lines: list[str], folder: Path) -> str:
    """The first `zs3` and each first `accelerate launch` as they stand there, all others by FORK. Returns what the last
    of them printed."""
    started, waiting, printed = set(), [], ""
    for line in [*lines, None]:
        words = [] if line is None else words_of(line)
        what = words[3 if words[2:3] == ["-m"] else 2] if words[:2] == ["accelerate", "launch"] else "zs3"
        if waiting and (line is None or what not in started):
            printed = execute([sys.executable, "-c", FORK, json.dumps(waiting)], folder)
            waiting = []
        if line is not None and what in started:
            at = words.index(what)
            waiting.append(words[at:])
        elif line is not None:
            started.add(what)
            printed = execute(words, folder)
    return printed


def test_the_demo_the_python_and_the_export_work(workplace):
    assert "make demo\n" in blocks("bash", "README")[0]
    # What `make demo` runs once .venv is there; the installation itself is what `make test` has just done.
    make = ["make", "--no-print-directory", "-n", "demo", f"DEMO={DEMO}"]
    recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.splitlines() if "--num_pictures" in line]
    printed = execute(words_of(command.removeprefix(".venv/bin/")), workplace)
    assert "report.md" in printed.splitlines()[-3]
    assert (workplace / "runs/demo/report.md").exists() and (workplace / "runs/demo/own_labels.png").exists()
    (line,) = assembling()
    assert "the checkpoint is in runs/day_one" in execute(words_of(line), workplace)
    assert assembling("pipeline") == [line]
    training = "\n".join(blocks("python", "training")).replace("max_steps=100", "max_steps=2, report_to='none'")
    lines = [*blocks("python", "README"), *blocks("python", "pipeline"), "print('====')", training]
    printed, of_training = execute([sys.executable, "-c", "\n".join(lines)], workplace).split("====\n")
    (found,) = re.findall(r"^\{'.*'\}$", printed, re.MULTILINE)  # by the checkpoint in the repository
    assert set(re.findall(r"'(.*?)'", found)) == {"sky", "water", "yellow star", "red square"}
    assert re.search(r"\(128, 128\) \['sky', 'grass'", printed) and "[128, 128]" in printed
    assert "words that repeat: 1" in printed and printed.splitlines()[-1] in ("sky", "grass", "water", "red square")
    assert (workplace / "overlay.png").exists() and (workplace / "runs/demo/overlay.png").exists()
    assert re.search(r"^\d+\.\d+$", of_training, re.MULTILINE)  # eval_loss
    assert (workplace / "runs/trainer/merged/model.safetensors").exists()
    (export,) = [block for block in blocks("bash", "pipeline") if "zs3 export" in block]
    execute(words_of(export), workplace)
    assert (workplace / "runs/demo/zs3.pt2").exists()


def test_the_commands_of_training_evaluation_and_release_work(workplace):
    lines = [line for block in blocks("bash", "README") for line in block.splitlines() if "make" not in line]
    lines = [line for line in lines if line not in assembling()]
    lines += ["zs3 check --dataset runs/scenes"]
    assert f"`{lines[-1].replace('runs/scenes', 'DIR')}`" in PAGES["README"]
    for line in [line for block in blocks("bash", "evaluation") for line in block.splitlines()]:
        if line not in lines and "runs/scenes" in line or line.startswith("zs3 compare"):
            lines.append(line)
    execute_all(lines, workplace)
    results = [workplace / f"runs/{name}.json" for name in ("stage2/gzs3", "stage2/gzs3_ensemble", "comparison")]
    assert all(path.exists() for path in results) and len(list((workplace / "runs/figures").iterdir())) == 1
    folder = workplace / "runs/release/zs3-scenes"
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()


def test_the_evaluations_of_large_datasets_are_understood(monkeypatch, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("bash", "evaluation") for line in block.splitlines() if " data" in line]
    for line in lines:
        _, _, script, *words = shlex.split(line)
        arguments, config = {"train.py": (TrainArgs, Zs3Config), "eval.py": (EvalArgs, None)}[script]
        args, _ = read_arguments(arguments, words, config_class=config)
        args.check()
    assert len(lines) == 4


def test_every_command_of_the_pages_exists_and_is_installed():
    named = {name: set(re.findall(r"(?:^|`)zs3 (\w+)", page, re.MULTILINE)) for name, page in PAGES.items()}
    known = {name for name, *_ in COMMANDS}
    assert {name: commands - known for name, commands in named.items() if commands - known} == {}
    assert {"scenes", "check", "compare", "release"} <= named["README"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"zs3": "zs3.__main__:main"}


def anchors(path: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_pages_leads_somewhere():
    lost = []
    for name, page in PAGES.items():
        page_path = ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page):
            path, _, anchor = link.partition("#")
            target = page_path.parent / path if path else page_path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                lost.append(f"{name}: {link}")
    assert not lost


def test_the_readme_is_short_and_what_it_names_is_there():
    readme = PAGES["README"]
    assert len(readme) <= 8000
    equations = re.findall(r"^\| Eq\. .* \| `(\w+)` in `(\S+)` \|$", readme, re.MULTILINE)
    assert len(equations) == 5
    for function, path in equations:
        assert f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8")
    wings = {path.parent.name for path in ROOT.glob("zs3/*/__init__.py")}
    assert wings == set(re.findall(r"`zs3/(\w+)/`", readme))


def test_the_functions_and_tests_of_the_method_are_there():
    files = [*ROOT.glob("*.py"), *ROOT.glob("zs3/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    rows = re.findall(r"^\| (?:\d|Eq).*? \| (.*?) \| .* \|$", PAGES["method"], re.MULTILINE)
    assert len(rows) > 20
    for name in re.findall(r"`(?:[\w.]+\.)?(\w+)`", " ".join(rows)):
        known = rf"(?:def|class) {name}\b|self\.{name} = |^    {name}: Tensor"
        assert re.search(known, code, re.MULTILINE) or list(ROOT.glob(f"zs3/*/{name}.py")), name
    for name in re.findall(r"`(test_\w+)\*?`", PAGES["method"]):
        assert f"\ndef {name}" in tests, name


def test_no_paragraph_of_the_pages_is_long():
    long = []
    for name, page in PAGES.items():
        prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        for block in re.split(r"\n\s*\n|\n(?=- |\| |#)", prose):
            if not block.startswith("|") and len(block.split()) > 90:
                long.append(f"{name}: {len(block.split())} words, {block[:60]}")
    assert not long


def test_the_comparison_of_the_evidence_is_that_of_the_result_file():
    path = RESULTS / "first_edition" / "zs3-scenes_compare.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [result["scores"][name] for name in ("miou_seen", "miou_unseen", "hiou")]
    for side in ("a", "b"):
        assert " / ".join(f"{100 * row[side]:.1f}" for row in rows) in PROSE["evidence"]
    low, high = (f"{100 * bound:.1f}" for bound in rows[2]["interval"])
    assert f"{100 * rows[2]['difference']:.1f} points of hIoU, {low} to {high} over images" in PROSE["evidence"]


FIRST_EDITION = [RESULTS / "first_edition" / f"scenes_{name}.json" for name in ("tables", "choices")]
ABLATIONS = [*FIRST_EDITION, RESULTS / "photographs_tables.json"]


def test_the_table_of_the_readme_is_that_of_the_result_files():
    tables = [table for path in ABLATIONS for table in json.loads(path.read_text(encoding="utf-8"))["tables"].values()]
    found = re.findall(r"^\| .* ± .* \|$", PAGES["README"], re.MULTILINE)
    expected = {}
    for row in (row for table in tables for row in table["rows"]):
        halves = [
            (row["scores"][n], np.ptp(row["scores"][n]["interval"]) / 2) for n in ("miou_seen", "miou_unseen", "hiou")
        ]
        cells = [f"{score['mean']:.1f} ± {half:.1f}" for score, half in halves]
        expected[f"| {row['title']} | {IMAGE_LABELS[row['told']]} | {' | '.join(cells)} |"] = row["title"], cells[2]
    for name, title in README_ROWS.items():
        (row,) = [line for line in found if line.startswith(f"| {name} | ")]
        assert row.replace(name, title, 1) in expected
    assert len(found) == len(README_ROWS)
    (with_ensemble,) = re.findall(r"with the ensemble \(hIoU (.*? ± \d+\.\d)", PROSE["README"])
    assert ("stage 2, pseudo labels, ensemble on, crops", with_ensemble) in expected.values()


def test_the_tables_of_the_evidence_are_those_of_the_result_files():
    rows = re.findall(r"^\| .*[±→].* \|$", PAGES["evidence"], re.MULTILINE)
    there = "".join(path.with_suffix(".md").read_text(encoding="utf-8") for path in ABLATIONS)
    for longer, shorter in SHORTER.items():
        assert longer in there and f'"{longer}"' in PROSE["evidence"]
        there = there.replace(longer, shorter)
    assert len(rows) > 130 and set(rows) <= set(there.splitlines())


def test_what_remains_of_the_first_edition_after_holm_is_what_the_page_says():
    """By the definition: the smallest of m p values is kept if it is at most 0.05 / m, then the next of m - 1, ..."""
    tables, found = json.loads(FIRST_EDITION[0].read_text(encoding="utf-8"))["tables"], {}
    for difference in (pair for name in ("table5", "table6") for pair in tables[name]["differences"]):
        for name, score in difference["scores"].items():
            if score["paper"] is not None:
                found[difference["title"], name] = stats.ttest_1samp(score["seeds"], 0).pvalue
    ordered = sorted(found, key=found.get)
    kept = list(takewhile(lambda key: found[key] <= 0.05 / (len(ordered) - ordered.index(key)), ordered))
    labels = ("stage 2, pseudo labels − stage 2, nothing told", "stage 2 − stage 2, nothing told")
    assert len(ordered) == 21 and set(kept) == set(itertools.product(labels, ("miou_unseen", "hiou")))
    assert "After Holm's correction over these 21, four remain" in PROSE["evidence"]


def test_the_ratios_of_the_pages_are_those_of_the_result_files():
    found = ratios.ratios(RESULTS)
    assert f"\n\n{ratios.table(found)}\n" in PAGES["performance"]
    of_readme = ratios.readme_table(found)
    assert f"\n\n{of_readme}\n" in PAGES["README"] and of_readme.count("\n") == 5
    files = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ratios.NAMES]
    assert len({result["commit"] for result in files}) == 1


def test_the_label_stage_of_the_pages_is_that_of_the_result_file():
    result = json.loads((RESULTS / "label_count.json").read_text(encoding="utf-8"))
    seconds = {row["labels"]: row["seconds"] for row in result["rows"] if row["method"] == "semantic_map"}
    (goal,) = [goal for goal in result["goals"]["like a trained model's"] if goal["name"].startswith("time at 20000")]
    assert len(seconds) == 4 and f"20,000 labels it is {goal['figure']:.2f} times that with 150" in PROSE["performance"]
    beside = re.findall(r"^\| 171 \| .*$", PAGES["performance"], re.MULTILINE)
    assert len(beside) == 10 and set(beside) <= set((RESULTS / "label_count.md").read_text().splitlines())


def test_the_floor_of_the_pages_is_that_of_the_result_file():
    (row,) = [
        row
        for row in json.loads((RESULTS / "network.json").read_text(encoding="utf-8"))["results"]
        if row["backbone"] == "resnet50" and row["size"] == 512
    ]
    ours = row["networks"]["zs3"]
    assert f"takes {ours['times_the_floor']:.2f} times this limit" in PROSE["performance"]
    encoder, floor = ours["parts"]["deformable encoder"], row["parts_floor"]["deformable encoder"]["floor_seconds"]
    assert f"its deformable encoder {encoder / floor:.2f} times its part of it" in PROSE["performance"]
    assert f"and {100 * encoder / sum(ours['parts'].values()):.0f} % of the time" in PROSE["performance"]


def test_the_evaluator_of_the_pages_is_that_of_the_result_file():
    result, prose = json.loads((RESULTS / "evaluator.json").read_text(encoding="utf-8")), PROSE["performance"]
    shares = {}
    for row in result["times"]:
        shares.setdefault(row["maps"], []).append(100 * row["share_of_inference"])
    assert f"takes {max(shares['objects']):.1f} % of the inference" in prose
    assert f"rejection it takes {max(shares['objects, with counters']):.1f} % or less" in prose
    scored = [round(share) for share in shares["objects, with counters and scores"]]
    assert f"All together take {scored[0]} % (171 classes) or {scored[1]} % (847 classes)" in prose
    held = {}
    for row in (row for row in result["memory"] if row["way"] == "ConfusionMatrix"):
        held.setdefault(row["classes"], []).append((row["images"], row["held_mib"] * 1024))
    growth = [(after - before) / (images - fewer) for (fewer, before), (images, after) in held.values()]
    assert {f"{kib:.1f}" for kib in growth} == {"0.8"} and "about 0.8 KiB an image" in prose
    assert f"take {result['bootstrap']['seconds']:.1f} seconds" in prose


def test_no_placeholder_is_left():
    assert not [name for name, page in PAGES.items() if re.findall(r"@[A-Z_]+@|\{\{\w+\}\}", page)]
