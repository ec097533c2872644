"""A stranger's process: checkpoints load offline, without the project, through every door, and answer the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_wall import HUB_HALF
from tiny import CLASS_NAMES, byte_tokenizer, save_checkpoint

from encoders_zs3 import FAMILIES
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor

LABELS = [["blue square", "azure box"], {"name": "meadow", "synonyms": ["grass"], "templates": ["a {}."]}, "sky"]
NAMES = ["blue square", "meadow", "sky"]
TEMPLATES = ["one {} only", "über {}"]  # not the default
CODE = [f"{name}.py" for name in HUB_HALF]
ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOORS = ("AutoModel", "AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation")

CHECKPOINT = "é 2 (1)"  # the name of a folder ends up in those of the modules that are loaded from it


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)


def processor() -> Zs3Processor:
    image_processor = Zs3ImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, ignore_index=65535)
    return Zs3Processor(image_processor, byte_tokenizer(), prompt_templates=TEMPLATES)


def hub_cache(folder: Path, checkpoint: Path) -> None:
    """huggingface_hub's layout: content under blobs, a commit of links to it, and a branch that names the commit."""
    repository = folder / "models--someone--zs3-tiny"
    snapshot = repository / "snapshots" / COMMIT
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """After both strangers have been here. The first loads a local folder and saves what it loaded; the second loads
    from a Hub cache, and what the first one saved."""
    folder = tmp_path_factory.mktemp("stranger")
    picture().save(folder / "image.png")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    save_checkpoint(folder / CHECKPOINT, seed=1)
    processor().save_pretrained(folder / CHECKPOINT)
    save_checkpoint(folder / "textless", text=False)
    for family in FAMILIES:
        options = {"vision": True, "class_head": "regions", "clip_ensemble_weight": None}
        save_checkpoint(folder / "families" / family, family=family, **options)
    hub_cache(folder / "hub", folder / CHECKPOINT)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "HOME": str(elsewhere)}
    first = [CHECKPOINT, "--prefix", "folder", "--resave", str(folder / "resaved"), "--textless", "textless"]
    first += ["--drop", "dropped"]
    first = [str(folder / word) if word in (CHECKPOINT, "textless", "dropped") else word for word in first]
    second = ["someone/zs3-tiny", "--prefix", "hub", "--again", str(folder / "resaved")]
    second += ["--families", str(folder / "families")]
    for number, arguments in enumerate((first, second)):
        run = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("stranger.py")), str(folder), *arguments],
            cwd=elsewhere,
            env={**environment, "HF_MODULES_CACHE": str(folder / f"modules{number}")},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, np.ndarray]:
    """What the model gives here, in the project's own process."""
    model = save_checkpoint(folder / "same", seed=1)  # the same seed, the same weights
    inputs = processor()(picture(), class_names=LABELS)
    maps = {}
    for name, text in (("map", {}), ("vocabulary", {"input_ids": None, "attention_mask": None})):
        with torch.no_grad():
            outputs = model(**{**inputs, **text})
        maps[name] = processor().post_process_semantic_segmentation(outputs, [(50, 70)])[0].numpy()
        if name == "map":
            maps |= {"mask_logits": outputs.mask_logits.numpy(), "class_logits": outputs.class_logits.numpy()}
    assert sorted(np.bincount(maps["map"].ravel()))[-2] > 100  # a constant would match by chance
    return maps


@pytest.fixture(scope="module", params=["folder", "hub", "again"])
def answers(folder, request) -> tuple[dict[str, np.ndarray], dict]:
    """What a stranger wrote down: arrays and facts."""
    with np.load(folder / f"{request.param}.npz") as arrays:
        return dict(arrays), json.loads((folder / f"{request.param}.json").read_text())


def test_every_model_door_gives_the_models_own_answer(answers, expected):
    arrays, facts = answers
    for door in DOORS:
        name, module = facts[door]
        assert name == "Zs3ForSemanticSegmentation" and module.startswith("transformers_modules.")
        np.testing.assert_allclose(arrays[f"{door}.mask_logits"], expected["mask_logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays[f"{door}.class_logits"], expected["class_logits"], rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(arrays[f"{door}.map"], expected["map"])


def test_config_and_processors_load(answers):
    _, facts = answers
    assert facts["config"] == ["Zs3Config", "zs3", CLASS_NAMES]
    assert facts["processors"] == ["Zs3Processor", "Zs3ImageProcessor"]
    assert facts["kept"] == [TEMPLATES, 65535, 77]


def test_the_pipeline_gives_the_models_own_answer(answers, expected):
    arrays, facts = answers
    assert facts["pipeline"] == ["Zs3Pipeline", "zero-shot-semantic-segmentation"]
    np.testing.assert_array_equal(arrays["pipeline.map"], expected["map"])
    np.testing.assert_array_equal(arrays["vocabulary.map"], expected["vocabulary"])
    label_ids = np.unique(expected["map"]).tolist()
    assert [segment[:2] for segment in facts["segments"]] == [[NAMES[label_id], label_id] for label_id in label_ids]
    assert all(0 < score <= 1 for _, _, score in facts["segments"])
    for mask, label_id in zip(arrays["pipeline.masks"], label_ids, strict=True):
        np.testing.assert_array_equal(mask, np.where(expected["map"] == label_id, 255, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_without_training(folder, family):
    """One stranger loads them all; here the same checkpoints are loaded by the project's own code."""
    model = Zs3ForSemanticSegmentation.from_pretrained(folder / "families" / family).eval()
    own = Zs3Processor.from_pretrained(folder / "families" / family)
    with torch.no_grad():
        outputs = model(**own(picture(), class_names=LABELS))
    (expected,) = own.post_process_semantic_segmentation(outputs, [(50, 70)])
    with np.load(folder / "families.npz") as arrays:
        np.testing.assert_allclose(arrays[f"{family}.region_embeds"], outputs.region_embeds.numpy(), atol=1e-5)
        assert (arrays[f"{family}.map"] == expected.numpy()).mean() > 0.999
    assert outputs.region_embeds.std(dim=1).max() > 1e-3  # proposals differ by more than the tolerance above


def test_transformers_own_pipeline_draws_the_stored_vocabulary(answers, expected):
    arrays, facts = answers
    label_ids = np.unique(expected["vocabulary"])
    assert facts["stock"] == [CLASS_NAMES[label_id] for label_id in label_ids]
    for mask, label_id in zip(arrays["stock.masks"], label_ids, strict=True):
        np.testing.assert_array_equal(mask, np.where(expected["vocabulary"] == label_id, 255, 0))


def test_a_stranger_stores_a_vocabulary_by_its_names(answers, expected):
    arrays, facts = answers
    assert facts["new vocabulary"] == NAMES
    ours = arrays["new vocabulary.class_logits"]
    np.testing.assert_allclose(ours, expected["class_logits"], rtol=1e-4, atol=1e-3)


def test_without_its_text_tower_a_checkpoint_still_names_its_vocabulary(folder, expected):
    arrays, facts = np.load(folder / "dropped.npz"), json.loads((folder / "dropped.json").read_text())
    label_ids = np.unique(expected["map"])
    stock = [NAMES[label_id] for label_id in label_ids]
    assert facts == {"tower": False, "lost": [], "names": NAMES, "stock": stock}
    for name in ("map", "named"):
        np.testing.assert_array_equal(arrays[name], expected["map"])
    for mask, label_id in zip(arrays["stock.masks"], label_ids, strict=True):
        np.testing.assert_array_equal(mask, np.where(expected["map"] == label_id, 255, 0))


def test_a_strangers_copy_is_complete(folder):
    for name in CODE:
        source = (ROOT / name).read_bytes()
        assert (folder / CHECKPOINT / name).read_bytes() == source, name
        assert (folder / "resaved" / name).read_bytes() == source, name
    python = [sorted(file.name for file in (folder / name).glob("*.py")) for name in (CHECKPOINT, "resaved")]
    assert python == [CODE, CODE]
    configs = [json.loads((folder / name / "config.json").read_text()) for name in (CHECKPOINT, "resaved")]
    for key in ("auto_map", "custom_pipelines", "class_names", "id2label"):
        assert configs[0][key] == configs[1][key], key


def test_without_a_text_tower_only_the_stored_names_can_be_asked_for(folder):
    label_map = np.load(folder / "textless.npy")
    assert label_map.shape == (50, 70) and set(np.unique(label_map)) <= {0, 1}
    message = (folder / "textless.txt").read_text()
    assert "'zebra'" in message and "no text tower" in message and "red circle" in message
