"""The checkpoint in the repository: small, with the project's own code, and as good as its card says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.checkpoints import load_processor, weights_sha256
from zs3.scenes.dataset import TEST_SCENES
from zs3.scenes.render import CLASS_NAMES, UNSEEN, render_scene
from zs3.scores.confusion import ConfusionMatrix

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "hub_cards" / "zs3-scenes"
RESULT = json.loads((ROOT / "docs" / "results" / "zs3-scenes.json").read_text(encoding="utf-8"))


def code(folder: Path) -> dict[str, bytes]:
    """The Python files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git, so nothing says which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0")[:-1] if os.path.lexists(ROOT / name)]


def test_its_weights_are_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6


def test_its_code_is_that_of_the_root():
    ours = {path.name: path.read_bytes() for path in ROOT.glob("*_zs3.py")}
    theirs = code(FOLDER)
    differing = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    assert not differing, f"{differing} of {FOLDER} differ from the root's: `make hub_cards` copies them"


def test_its_code_is_what_save_pretrained_writes(tmp_path):
    model = Zs3ForSemanticSegmentation.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path)
    load_processor(str(FOLDER), model.config).save_pretrained(tmp_path)
    assert code(tmp_path) == code(FOLDER)


def test_no_file_of_the_project_is_a_symbolic_link():
    """Windows' git writes links as small text files, and a copied folder leaves behind what its links lead to."""
    assert [path for path in tracked() if path.is_symlink()] == []


def test_the_readmes_example_of_it_works_in_a_copy_without_links(tmp_path):
    for path in tracked():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.write_text(os.readlink(path))  # as `git clone -c core.symlinks=false` has it
        else:
            shutil.copyfile(path, copy)
    examples = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [text for text in examples if "hub_cards/zs3-scenes" in text]
    example += "print(render_scene.__code__.co_filename)"
    environment = dict(os.environ, PYTHONPATH=str(tmp_path), HF_MODULES_CACHE=str(tmp_path / "modules"))
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    labels, place = done.stdout.splitlines()
    assert set(re.findall("'(.*?)'", labels)) == {"sky", "water", "yellow star", "red square"}
    assert place == str(tmp_path / "zs3" / "scenes" / "render.py")


def test_its_card_has_the_numbers_of_the_result_file_of_these_weights():
    assert RESULT["checkpoint_sha256"] == weights_sha256(str(FOLDER)) and RESULT["num_images"] == 1000
    found = {entry.metric_type: entry.metric_value for entry in ModelCard.load(FOLDER / "README.md").data.eval_results}
    assert found == {name: RESULT[name] for name in found} and {"miou_seen", "miou_unseen", "hiou"} <= set(found)


@pytest.mark.filterwarnings("ignore")
def test_it_segments_scenes_as_well_as_its_card_says():
    """The first 25 of the 1000 test scenes, through the pipeline."""
    segment = pipeline(model=str(FOLDER), trust_remote_code=True)
    confusion = ConfusionMatrix(len(CLASS_NAMES), 255)
    for index in range(25):
        scene = render_scene(seed=TEST_SCENES, index=index)
        result = segment(Image.fromarray(scene.image), candidate_labels=CLASS_NAMES, output="map")
        confusion.update(np.asarray(result["segmentation"]), scene.label)
    scores = confusion.scores([name not in UNSEEN for name in CLASS_NAMES])
    assert scores["pixel_accuracy"] == pytest.approx(RESULT["pixel_accuracy"], abs=0.05)
    assert scores["miou_unseen"] > 0.3  # far from a model that has only seen its seen classes
