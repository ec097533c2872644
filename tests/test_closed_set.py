"""The closed-set comparison: its targets by loops over pixels, and its scores from transformers' own label maps."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation

from benchmarks.closed_set import binary_masks, main
from processing_zs3 import Zs3ImageProcessor
from zs3.command_line import run
from zs3.data.records import load_split
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN

RECIPE = Path(__file__).parent.parent / "recipes" / "scenes_stage1.yaml"


def call(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["closed_set", *map(str, words)])
    run(main)


def test_an_image_is_cut_into_a_mask_for_each_class_without_its_ignored_pixels():
    labels = torch.tensor([[[3, 3, -1], [0, 3, 0]], [[-1, -1, -1], [-1, -1, -1]]])
    masks, ids = binary_masks(labels)
    assert [own.tolist() for own in ids] == [[0, 3], []] and masks[1].shape == (0, 2, 3)
    for mask, own in zip(masks[0], ids[0], strict=True):
        assert all(float(mask[y, x]) == float(labels[0, y, x] == own) for y in range(2) for x in range(3))


def test_it_is_trained_and_scored_without_a_name_for_an_unseen_class(tmp_path, monkeypatch, capsys):
    data, folder = tmp_path / "scenes", tmp_path / "run"
    write_dataset(data, num_train=4, num_validation=3, seed=0)
    few = ["--max_steps", 2, "--batch_size", 2, "--num_workers", 0, "--test_short_edge", 80]  # 80 is padded to 96
    call(monkeypatch, "train", "--config", RECIPE, "--dataset", data, "--output_dir", folder, *few)
    call(monkeypatch, "eval", "--model", folder / "final", "--dataset", data, "--output", folder / "r.json")
    result = json.loads((folder / "r.json").read_text())

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "final").eval()
    names = list(model.config.id2label.values())
    assert sorted(names) == sorted(set(CLASS_NAMES) - set(UNSEEN)) and model.config.hidden_dim == 64
    processor = Zs3ImageProcessor.from_pretrained(folder / "final")
    right = pixels = 0
    for image, label, _ in load_split(data, "validation"):
        with torch.inference_mode():
            outputs = model(**processor(images=image))
        masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, scale_factor=4, mode="bilinear")
        masks = torch.nn.functional.interpolate(masks[..., :80, :80], size=label.shape, mode="bilinear").sigmoid()
        probs = outputs.class_queries_logits.softmax(-1)[..., :-1]
        found = torch.einsum("bqc,bqhw->bchw", probs, masks)[0].argmax(0).numpy()
        right += sum(names[found[at]] == CLASS_NAMES[label[at]] for at in np.ndindex(label.shape) if label[at] != 255)
        pixels += int((label != 255).sum())
    assert result["pixel_accuracy"] == pytest.approx(right / pixels, abs=2e-3)
    assert result["miou_unseen"] == 0 and result["num_images"] == result["split_images"] == 3
    assert result["versions"]["torch"] == torch.__version__
    assert result["unseen"] == UNSEEN and result["seen_unseen_confusion"]["of_unseen"]["wrong_seen"] == 1
    call(monkeypatch, "train", "--config", RECIPE, "--dataset", data, "--output_dir", folder, *few)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(monkeypatch, "train", "--config", RECIPE, "--dataset", data, "--output_dir", folder, *few, "--seed", 1)
    assert "has seed 0, this command 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--backbone", "microsoft/resnet-18"], "--backbone microsoft/resnet-18: the closed-set"),
        (["train", "--unseen_labels", "ground_truth"], "--unseen_labels ground_truth: the closed-set"),
        (["train", "--backbone_norm", "frozen"], "--backbone_norm frozen: the closed-set comparison has batch alone"),
        (["eval", "--model", "m", "--setting", "zs3"], "--setting zs3: the closed-set comparison has gzs3 alone"),
    ],
)
def test_flags_that_it_does_not_obey_are_refused(words, message, monkeypatch, capsys):
    where = {"train": ["--config", RECIPE, "--output_dir", "out"], "eval": ["--output", "out.json"]}[words[0]]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, words[0], *where, "--dataset", "data", *words[1:])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_another_word_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "test")
    assert stopped.value.code == 2 and "say `train` with the flags of train.py" in capsys.readouterr().err
