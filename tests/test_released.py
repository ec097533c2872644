"""The checkpoint in the repository: small, with the project's own code, and as good as its card says."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from zs3.checkpoints import weights_sha256
from zs3.evaluation import ConfusionMatrix
from zs3.release import code_files
from zs3.scenes import CLASS_NAMES, FIRST_VALIDATION, UNSEEN, render_scene

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "hub_cards" / "zs3-scenes"
RESULT = json.loads((ROOT / "docs" / "results" / "zs3-scenes.json").read_text(encoding="utf-8"))


def test_its_weights_are_small_and_its_code_is_the_projects():
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    files = [path for path in FOLDER.iterdir() if path.suffix == ".py"]
    assert {path.name for path in files} == {path.name for path in code_files(FOLDER)}
    assert all(path.is_symlink() and path.resolve() == ROOT / path.name for path in files)


def test_its_card_has_the_numbers_of_the_result_file_of_these_weights():
    assert RESULT["checkpoint_sha256"] == weights_sha256(str(FOLDER)) and RESULT["num_images"] == 200
    told = {entry.metric_type: entry.metric_value for entry in ModelCard.load(FOLDER / "README.md").data.eval_results}
    assert told == {name: RESULT[name] for name in told} and {"miou_seen", "miou_unseen", "hiou"} <= set(told)


@pytest.mark.filterwarnings("ignore")
def test_it_segments_scenes_as_well_as_its_card_says():
    """The first 25 of the 200 validation scenes, through the pipeline."""
    segment = pipeline(model=str(FOLDER), trust_remote_code=True)
    confusion = ConfusionMatrix(len(CLASS_NAMES), 255)
    for index in range(25):
        scene = render_scene(seed=0, index=FIRST_VALIDATION + index)
        result = segment(Image.fromarray(scene.image), candidate_labels=CLASS_NAMES, output="map")
        confusion.update(np.asarray(result["segmentation"]), scene.label)
    scores = confusion.scores([name not in UNSEEN for name in CLASS_NAMES])
    assert scores["pixel_accuracy"] == pytest.approx(RESULT["pixel_accuracy"], abs=0.05)
    assert scores["miou_unseen"] > 0.3  # far from a model that has only seen its seen classes
