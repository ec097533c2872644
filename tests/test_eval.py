"""eval.py: its numbers against sets of pixels counted by hand, one process against two, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModel, AutoProcessor

from eval import EvalArgs, evaluate, main
from processing_zs3 import Zs3ImageProcessor
from zs3.command_line import InputError, run
from zs3.data import load_split
from zs3.scenes import CLASS_NAMES, UNSEEN, write_dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, num_train=1, num_validation=5, seed=0)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory) -> Path:
    """The same with an image tower, whose weight in the ensemble is that of Zs3Config."""
    return make_checkpoint(tmp_path_factory.mktemp("with_clip"), vision=True)


def make_checkpoint(folder: Path, **kwargs) -> Path:
    """An untrained model whose masks are sharpened, with text vectors near its queries: many classes occur."""
    model = tiny_model(text=False, **kwargs)
    for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
        parameter.data *= 4
    with torch.no_grad():
        embeds = model(torch.randn(1, 3, 64, 64), text_embeds=torch.randn(1, 12)).class_embeds[0]
    queries = (embeds - embeds.mean(0))[[(0, 2, 4)[index % 3] for index in range(len(CLASS_NAMES))]]
    model.set_vocabulary(CLASS_NAMES, queries + 0.1 * queries.std() * torch.randn_like(queries))
    model.config.seen_class_names = [name for name in CLASS_NAMES if name not in UNSEEN]
    model.save_pretrained(folder)
    Zs3ImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def scores_by_hand(checkpoint: Path, data: Path, candidates: list[str]) -> dict[str, float | None]:
    """IoU of each candidate from sets of (image, pixel); pixels of other classes do not count."""
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    truth, predicted = ({name: set() for name in candidates} for _ in range(2))
    for number, (image, label, _) in enumerate(load_split(data, "validation")):
        rows = [CLASS_NAMES.index(name) for name in candidates]
        with torch.inference_mode():
            outputs = model(**processor(images=image), text_embeds=model.vocabulary[rows])
        (label_map,) = processor.post_process_semantic_segmentation(outputs, [label.shape])
        for pixel in np.ndindex(*label.shape):
            if label[pixel] != 255 and CLASS_NAMES[label[pixel]] in candidates:
                truth[CLASS_NAMES[label[pixel]]].add((number, pixel))
                predicted[candidates[label_map[pixel]]].add((number, pixel))
    union = {name: truth[name] | predicted[name] for name in candidates}
    return {name: len(truth[name] & predicted[name]) / len(union[name]) if union[name] else None for name in candidates}


@pytest.mark.parametrize("setting", ["gzs3", "zs3"])
def test_iou_is_that_of_pixel_sets(checkpoint, data, setting, tmp_path):
    candidates = CLASS_NAMES if setting == "gzs3" else [name for name in CLASS_NAMES if name in UNSEEN]
    expected = scores_by_hand(checkpoint, data, candidates)
    result = evaluate(
        EvalArgs(model=str(checkpoint), dataset=str(data), setting=setting, output=str(tmp_path / "r.json"))
    )
    assert result["per_class"] == pytest.approx(expected)
    assert sum(value is not None and value > 0 for value in expected.values()) > 1, "too easy: one class everywhere"
    unseen = [value for name, value in expected.items() if name in UNSEEN and value is not None]
    assert result["miou_unseen"] == pytest.approx(sum(unseen) / len(unseen))
    assert json.loads((tmp_path / "r.json").read_text()) == result


def confusion_by_hand(checkpoint: Path, data: Path, weight: float) -> dict[str, float | None]:
    """IoU with the ensemble, image by image: dense scores of the formula of section 4.6."""
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    seen = torch.tensor([name not in UNSEEN for name in CLASS_NAMES])
    both, either = np.zeros(len(CLASS_NAMES)), np.zeros(len(CLASS_NAMES))
    for image, label, _ in load_split(data, "validation"):
        inputs = processor(images=image)
        with torch.inference_mode():
            outputs = model(**inputs)
            clip = model.embed_proposals(processor.to_rgb(inputs["pixel_values"]), outputs.mask_logits)
        p = outputs.class_logits.softmax(-1)
        s = (100 * clip.embeds @ model.vocabulary.T).softmax(-1)
        s = torch.where(clip.shown[..., None], s, 1)
        probs = torch.where(seen, p**weight * s ** (1 - weight), p ** (1 - weight) * s**weight)
        masks = F.interpolate(outputs.mask_logits, scale_factor=4, mode="bilinear").sigmoid()
        masks = F.interpolate(masks, size=label.shape, mode="bilinear")
        found = torch.einsum("bqc,bqhw->bchw", probs, masks).argmax(1)[0].numpy()
        for place in range(len(CLASS_NAMES)):
            here, there = (label == place), (found == place) & (label != 255)
            both[place] += (here & there).sum()
            either[place] += (here | there).sum()
    return {n: b / e if e else None for n, b, e in zip(CLASS_NAMES, both, either, strict=True)}


@pytest.mark.parametrize("view", ["crops", "lazy"])
def test_the_ensemble_is_that_of_section_4_6(with_clip, data, view):
    args = EvalArgs(model=str(with_clip), dataset=str(data), ensemble=view, ensemble_weight=0.6)
    result = evaluate(args)
    assert result["per_class"] == pytest.approx(
        confusion_by_hand(with_clip, data, 0.6), abs=2e-3
    )  # ties may fall apart
    assert (result["clip_ensemble"], result["clip_ensemble_weight"]) == (view, 0.6)
    assert 0 < result["proposals_shown_to_clip"] <= 5
    assert (
        result["per_class"] != evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble="off"))["per_class"]
    )


def test_the_checkpoint_says_whether_to_ensemble(checkpoint, with_clip, data, tmp_path):
    def asked(model: Path, **options) -> tuple:
        result = evaluate(EvalArgs(model=str(model), dataset=str(data), max_images=1, **options))
        return result["clip_ensemble"], result["clip_ensemble_weight"]

    assert asked(checkpoint) == ("off", None)  # no image tower
    assert asked(with_clip) == ("crops", 0.8)
    assert asked(with_clip, ensemble_weight=0.7, ensemble="single_pass") == ("single_pass", 0.7)
    with pytest.raises(InputError, match="no CLIP image tower"):
        asked(checkpoint, ensemble="crops")
    shutil.copytree(with_clip, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"clip_ensemble_weight": None}))
    assert asked(tmp_path / "copy") == ("off", None)
    assert asked(tmp_path / "copy", ensemble_weight=0.5) == ("crops", 0.5)
    with pytest.raises(InputError, match="says not to"):
        asked(tmp_path / "copy", ensemble="crops")
    with pytest.raises(InputError, match="at most 1"):
        asked(with_clip, ensemble_weight=1.5)


def test_two_processes_give_the_result_of_one(checkpoint, data, tmp_path):
    one = evaluate(EvalArgs(model=str(checkpoint), dataset=str(data)))
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py"]
    command += ["--model", str(checkpoint), "--dataset", str(data), "--output", str(tmp_path / "two.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert one["num_images"] == 5


def test_pictures_are_drawn_evenly_over_the_split(checkpoint, data, tmp_path):
    args = EvalArgs(model=str(checkpoint), dataset=str(data), pictures=str(tmp_path), num_pictures=3)
    evaluate(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00002.png", "00004.png"]  # of 0 to 4


def test_a_model_that_saw_unseen_masks_gets_no_zero_shot_number(checkpoint, data, tmp_path):
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    model.config.seen_class_names = list(CLASS_NAMES)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="trained on masks of"):
        evaluate(EvalArgs(model=str(tmp_path), dataset=str(data)))
    result = evaluate(EvalArgs(model=str(tmp_path), dataset=str(data), setting="ovs", max_images=1))
    assert result["miou"] is not None and result["miou_unseen"] is None and result["hiou"] is None
    assert result["trained_on_masks_of"] == CLASS_NAMES


def test_a_checkpoint_that_lacks_weights_gets_no_number(checkpoint, data, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    weights = load_file(path)
    save_file(
        {name: w for name, w in weights.items() if "class_projection" not in name},
        tmp_path / "copy" / "model.safetensors",
    )
    with pytest.raises(InputError, match="incomplete.*class_projection"):
        evaluate(EvalArgs(model=str(tmp_path / "copy"), dataset=str(data)))


def test_a_missing_checkpoint_is_one_line_and_exit_code_2(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(tmp_path / "none"), "--dataset", str(data)])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "none" in line
