"""The choice of the ensemble's weight: its counts against loops over pixels, its verdicts, what it may look at."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import byte_tokenizer, tiny_model

from eval import evaluate
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from zs3.command_line import InputError
from zs3.data.records import load_split
from zs3.evaluation.arguments import EvalArgs
from zs3.evaluation.ensemble_weight import OFF, WeightArgs, WeightCounts, choose, decide, main, report
from zs3.pseudo_labels import write_shard
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN

SEEN = [name for name in CLASS_NAMES if name not in UNSEEN]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, num_train=5, num_validation=1, seed=0)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"), vision=True, unseen_labels="ground_truth")


def save(folder: Path, seen: list[str] | None = SEEN, **kwargs) -> Path:
    model = tiny_model(seen_class_names=seen, **kwargs)
    processor = Zs3Processor(Zs3ImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}), byte_tokenizer())
    model.set_vocabulary(CLASS_NAMES, processor=processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def random_counts(seed: int, images: int = 4) -> tuple[WeightCounts, list[tuple]]:
    """Of random pictures with 5 classes, of which 1 and 4 are unseen."""
    rng = np.random.default_rng(seed)
    is_seen = np.array([True, False, True, True, False])
    counts, pictures = WeightCounts(is_seen, min_share=0.2), []
    for _ in range(images):
        prediction, label = rng.integers(0, 5, (6, 7)), rng.choice([-1, 0, 2, 3], (6, 7))
        present = rng.random(2) < 0.5
        counts.add(prediction, label, present)
        pictures.append((prediction, label, present))
    return counts, pictures


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_loops_over_pixels_and_pictures(seed):
    counts, pictures = random_counts(seed)
    drawn = np.random.default_rng(seed).integers(0, 3, (3, len(pictures)))
    for times, (seen, unseen, both) in zip(drawn, counts.scores(drawn), strict=True):
        ious, f1s = [], []
        for label_id in (0, 2, 3):
            inside = outside = 0
            for count, (prediction, label, _) in zip(times, pictures, strict=True):
                for found, true in zip(prediction.ravel(), label.ravel(), strict=True):
                    if true != -1 and label_id in (found, true):
                        inside += count * (found == true)
                        outside += count * (found != true)
            ious += [inside / (inside + outside)] if inside + outside else []
        for place, label_id in enumerate((1, 4)):
            hit = wrong = 0
            for count, (prediction, _, present) in zip(times, pictures, strict=True):
                found = (prediction == label_id).sum() >= 0.2 * prediction.size
                hit += count * (found and present[place])
                wrong += count * (found != present[place])
            f1s += [2 * hit / (2 * hit + wrong)] if hit + wrong else []
        assert seen == pytest.approx(sum(ious) / len(ious) if ious else 0)
        assert unseen == pytest.approx(sum(f1s) / len(f1s) if f1s else 0)
        assert both == pytest.approx(2 * seen * unseen / (seen + unseen) if seen + unseen else 0)


def counts_of(good: float, images: int = 60) -> WeightCounts:
    """Pictures with one seen and one unseen class; a picture is right in every respect with the chance `good`."""
    rng, counts = np.random.default_rng(0), WeightCounts(np.array([True, False]), min_share=0.01)
    label = np.zeros((2, 2), dtype=int)
    label[1] = -1
    for right in rng.random(images) < good:
        prediction = np.array([[0, 0], [1, 1]]) if right else np.array([[1, 1], [0, 0]])
        counts.add(prediction, label, np.array([right]))
    return counts


def test_a_weight_is_taken_only_where_it_is_surely_better_than_none():
    better = decide({OFF: counts_of(0.3), 0.7: counts_of(0.5), 0.8: counts_of(0.9)}, 60, seed=0)
    assert better["clip_ensemble_weight"] == 0.8 and better["weights"]["0.8"]["better_than_off"] > 0.99
    worse = decide({OFF: counts_of(0.9), 0.7: counts_of(0.5), 0.8: counts_of(0.3)}, 60, seed=0)
    assert worse["clip_ensemble_weight"] is None
    alike = decide({OFF: counts_of(0.7), 0.8: counts_of(0.7)}, 60, seed=0)
    assert alike["clip_ensemble_weight"] is None
    for result, words in ((better, "take the weight 0.8"), (worse, "do not ensemble")):
        assert words in report({**result, "image_ids": ["a"] * 60, "dataset": "d", "settings": {"split": "train"}})


def test_the_answer_goes_into_the_checkpoint_and_unseen_masks_do_not_matter(checkpoint, data, tmp_path):
    args = WeightArgs(model=str(checkpoint), dataset=str(data), weights=[0.6, 0.8], seed=1)
    records = load_split(data, "train")
    truth = np.stack([np.isin([CLASS_NAMES.index(name) for name in UNSEEN], label) for _, label, _ in records])
    assert truth.any()
    write_shard(tmp_path / "scores.parquet", records.image_ids, truth.astype(np.float32), UNSEEN, b"")
    args.unseen_labels, args.output = str(tmp_path / "scores.parquet"), str(tmp_path / "result.json")
    told = choose(args)
    assert list(told["weights"]) == ["off", "0.6", "0.8"] and len(told["image_ids"]) == 5
    assert json.loads((tmp_path / "result.json").read_text()) == told
    asked = EvalArgs(model=str(checkpoint), dataset=str(data), split="train", ensemble_weight=args.output)
    chosen = evaluate(replace(asked, max_images=2))  # the file as evaluation takes it
    assert chosen["clip_ensemble_weight"] == told["clip_ensemble_weight"]
    assert chosen["calibration"]["ensemble_weight_chosen"].startswith(
        "TUNED ON THE TEST IMAGES, 2 of 2, with the image"
    )
    # The same with the unseen names in another order,
    content = {"classes": list(CLASS_NAMES), "unseen": UNSEEN[::-1], "ignore_label": 255}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert choose(replace(args, label_space=str(tmp_path / "classes.json")))["weights"] == told["weights"]
    # from ground truth, and from label maps in which unseen classes are void.
    args.unseen_labels = "ground_truth"
    assert choose(args)["weights"] == told["weights"]
    void = tmp_path / "void"
    write_dataset(void, num_train=5, num_validation=1, seed=0)
    for file in (void / "train" / "labels").iterdir():
        label = np.array(Image.open(file))
        label[np.isin(label, [CLASS_NAMES.index(name) for name in UNSEEN])] = 255
        Image.fromarray(label).save(file)
    args.dataset, args.unseen_labels = str(void), str(tmp_path / "scores.parquet")
    assert choose(args)["weights"] == told["weights"]
    args.write = True
    written = choose(args)["clip_ensemble_weight"]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["clip_ensemble_weight"] == written and config["model_type"] == "zs3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unseen_labels": None}, "--unseen_labels is missing"),
        ({"weights": [1.2]}, "--weights must be at most 1, got 1.2"),
        ({"write": True, "model": "owner/name"}, "--write needs a checkpoint's folder"),
    ],
)
def test_wrong_flags_are_one_line(checkpoint, data, changes, words):
    flags = {"model": str(checkpoint), "dataset": str(data), "unseen_labels": "ground_truth", **changes}
    with pytest.raises(InputError, match=words):
        choose(WeightArgs(**flags))


def test_ground_truth_is_for_models_whose_training_had_it(data, tmp_path):
    model = save(tmp_path, vision=True, unseen_labels="pseudo")
    with pytest.raises(InputError, match="had no ground-truth image labels"):
        choose(WeightArgs(model=str(model), dataset=str(data), unseen_labels="ground_truth"))


def test_a_checkpoint_without_image_tower_or_with_unseen_masks_is_refused(data, tmp_path, call):
    with pytest.raises(InputError, match="no image tower"):
        choose(WeightArgs(model=str(save(tmp_path / "a")), dataset=str(data), unseen_labels="ground_truth"))
    leaky = save(tmp_path / "b", seen=CLASS_NAMES, vision=True)
    words = ["--model", str(leaky), "--dataset", str(data), "--unseen_labels", "ground_truth"]
    assert "trained on masks of" in call(main, *words).refusal
