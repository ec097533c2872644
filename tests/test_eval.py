"""eval.py: its numbers against sets of pixels counted by hand, one process against two, and what it refuses."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from forked import ended, start_two
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, change_json, save_scenes_checkpoint, tiny_encoder
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from clip_views_zs3 import embed_proposals
from encoders_zs3 import FAMILIES
from eval import evaluate, main
from zs3.command_line import InputError
from zs3.data.records import load_split
from zs3.evaluation import arguments
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import read_images, read_result
from zs3.label_space import load_label_space
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN
from zs3.scores.bootstrap import load_images
from zs3.typed_json import first_wrong

ROOT = Path(__file__).parent.parent
# Processes that read ahead take more time than they save for the few pictures here. The command in the test of two
# processes has them.
EvalArgs = partial(arguments.EvalArgs, num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, num_train=1, num_validation=5, seed=0)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_scenes_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory) -> Path:
    """The same with an image tower, whose weight in the ensemble is that of Zs3Config."""
    return save_scenes_checkpoint(tmp_path_factory.mktemp("with_clip"), vision=True)


def loaded(checkpoint: Path) -> tuple:
    """The model and the processor, as a stranger has them."""
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def iou_of_maps(
    data: Path, label_map: Callable[[Image.Image, tuple[int, int]], np.ndarray], candidates: list[str] = CLASS_NAMES
) -> dict[str, float | None]:
    """IoU of each candidate where label_map(image, size) is the prediction; pixels of other classes do not count."""
    both, either = np.zeros((2, len(candidates)))
    ids = np.array([CLASS_NAMES.index(name) for name in candidates])
    for image, label, _ in load_split(data, "validation"):
        found = np.where(np.isin(label, ids), ids[label_map(image, label.shape)], -1)
        for place, index in enumerate(ids):
            both[place] += ((label == index) & (found == index)).sum()
            either[place] += ((label == index) | (found == index)).sum()
    return {n: b / e if e else None for n, b, e in zip(candidates, both, either, strict=True)}


def scores_by_hand(checkpoint: Path, data: Path, candidates: list[str]) -> dict[str, float | None]:
    model, processor = loaded(checkpoint)
    rows = [CLASS_NAMES.index(name) for name in candidates]

    @torch.inference_mode()
    def label_map(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        outputs = model(**processor(images=image), text_embeds=model.vocabulary[rows])
        return processor.post_process_semantic_segmentation(outputs, [size])[0].numpy()

    return iou_of_maps(data, label_map, candidates)


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


class Encoder(NamedTuple):
    tower: PreTrainedModel
    texts: torch.Tensor
    scale: float


def dense_masks(mask_logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    masks = F.interpolate(mask_logits, scale_factor=4, mode="bilinear").sigmoid()
    return F.interpolate(masks, size=size, mode="bilinear")


def ensemble_by_hand(
    checkpoint: Path,
    data: Path,
    weight: float,
    unseen: list[str] = UNSEEN,
    encoder: Encoder | None = None,
    **options: object,
) -> dict[str, float | None]:
    """IoU with the ensemble: dense scores of the formula of section 4.6. encoder: in place of the checkpoint's.

    options: of `embed_proposals`.
    """
    model, processor = loaded(checkpoint)
    tower, texts, scale = encoder or (model.vision_model, model.vocabulary, 100)
    seen = torch.tensor([name not in unseen for name in CLASS_NAMES])

    @torch.inference_mode()
    def label_map(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        inputs = processor(images=image)
        outputs = model(**inputs)
        clip = embed_proposals(tower, processor.to_rgb(inputs["pixel_values"]), outputs.mask_logits, **options)
        p = outputs.class_logits.softmax(-1)
        s = (scale * clip.embeds @ texts.T).softmax(-1)
        s = torch.where(clip.shown[..., None], s, 1)
        probs = torch.where(seen, p**weight * s ** (1 - weight), p ** (1 - weight) * s**weight)
        return torch.einsum("bqc,bqhw->bchw", probs, dense_masks(outputs.mask_logits, size)).argmax(1)[0].numpy()

    return iou_of_maps(data, label_map)


def test_the_ensemble_is_that_of_section_4_6(with_clip, data):
    args = EvalArgs(model=str(with_clip), dataset=str(data), ensemble="crops", ensemble_weight="0.6")
    result = evaluate(args)
    assert result["per_class"] == pytest.approx(ensemble_by_hand(with_clip, data, 0.6), abs=2e-3)  # ties may fall apart
    assert (result["clip_ensemble"], result["clip_ensemble_weight"]) == ("crops", 0.6)
    assert (
        result["per_class"] != evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble="off"))["per_class"]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory) -> tuple[Path, Encoder]:
    """The folder of an encoder with one prompt; and its image tower, texts and scale as transformers has them."""
    folder = tmp_path_factory.mktemp(request.param)
    whole, tokenizer = tiny_encoder(request.param), byte_tokenizer(request.param)
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"prompt_templates": ["{}"]}))
    with torch.inference_mode():
        texts = [whole.get_text_features(**tokenizer([name], return_tensors="pt")) for name in CLASS_NAMES]
    texts = F.normalize(torch.cat([getattr(one, "pooler_output", one) for one in texts]), dim=-1)
    scale = whole.logit_scale.exp() if request.param == "clip" else 1 / whole.temperature
    tower = getattr(transformers, FAMILIES[request.param].vision_model).from_pretrained(folder).eval()
    return folder, Encoder(tower, texts, scale.item())


def test_the_ensemble_may_be_with_another_encoder(checkpoint, data, encoder):
    """The checkpoint itself has neither tower."""
    folder, by_hand = encoder
    args = EvalArgs(model=str(checkpoint), dataset=str(data), encoder=str(folder), ensemble="crops")
    args = replace(args, ensemble_weight="0.6")
    result = evaluate(args)
    assert result["per_class"] == pytest.approx(ensemble_by_hand(checkpoint, data, 0.6, encoder=by_hand), abs=2e-3)
    assert result["per_class"] != pytest.approx(scores_by_hand(checkpoint, data, CLASS_NAMES), abs=0.01)
    one_pass = evaluate(replace(args, ensemble="single_pass"))["per_class"]
    options = {"view": "single_pass", "patch_tokens": "values"}  # TIPSv2's as published
    assert one_pass == pytest.approx(ensemble_by_hand(checkpoint, data, 0.6, encoder=by_hand, **options), abs=2e-3)
    assert f"ensemble with {folder.name} (crops, weight 0.6" in result["protocol"]
    assert result["given_sha256"][str(folder)] == sha256_of(folder / "model.safetensors")
    assert set(result["given_sha256"]) == {str(folder), f"settings of {folder}"}
    (data.parent / "weight.json").write_text("{}")
    view, number = "--ensemble too: crops, single_pass, mixed", "a number as --ensemble_weight too"
    cases = [({"ensemble": None}, view), ({"ensemble": "off"}, view), ({"ensemble_weight": None}, number)]
    for options, words in [*cases, ({"ensemble_weight": str(data.parent / "weight.json")}, number)]:
        with pytest.raises(InputError, match=f"^--encoder needs {words}"):
            evaluate(replace(args, **options))
    with pytest.raises(InputError, match="no such folder"):
        evaluate(replace(args, encoder="./nowhere"))


def test_an_encoder_that_cannot_be_used_is_one_line(checkpoint, data, encoder, tmp_path):
    args = EvalArgs(model=str(checkpoint), dataset=str(data), encoder=str(tmp_path / "encoder"), ensemble="crops")
    args = replace(args, ensemble_weight="0.6")
    shutil.copytree(encoder[0], tmp_path / "encoder")
    (tmp_path / "encoder" / "processor_config.json").write_text(json.dumps({"prompt_templates": ["a photo"]}))
    with pytest.raises(InputError, match="^the prompts of .*encoder: "):
        evaluate(args)
    shutil.rmtree(tmp_path / "encoder")
    shutil.copytree(encoder[0], tmp_path / "encoder")
    state = load_file(tmp_path / "encoder" / "model.safetensors")
    key = next(name for name in state if name.startswith("text") and name.endswith(".bias"))
    state[key][0] = torch.nan
    save_file(state, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="^--encoder .*: .* NaN or infinite values"):
        evaluate(args)


def test_code_beside_a_checkpoint_that_knows_no_other_encoder_is_refused(checkpoint, data, encoder, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "older")
    code = tmp_path / "older" / "modeling_zs3.py"
    code.write_text(code.read_text().replace("logit_scale: float | None = None,", ""))
    args = EvalArgs(model=str(tmp_path / "older"), dataset=str(data), encoder=str(encoder[0]), ensemble="crops")
    with pytest.raises(InputError, match="is older than this eval.py"):
        evaluate(replace(args, ensemble_weight="0.6", trust_remote_code=True))


def test_the_ensemble_trusts_a_model_in_the_names_that_it_was_trained_on(with_clip, data, tmp_path):
    """Not in those that the benchmark calls seen, which an open-vocabulary evaluation makes no claim about."""
    others = [name for name in CLASS_NAMES if name not in UNSEEN][:5]
    space = json.loads((data / "classes.json").read_text()) | {"unseen": others}
    (tmp_path / "classes.json").write_text(json.dumps(space))
    asked = EvalArgs(model=str(with_clip), dataset=str(data), ensemble="crops", ensemble_weight="0.9", setting="ovs")
    found = evaluate(replace(asked, label_space=str(tmp_path / "classes.json")))["per_class"]
    assert found == pytest.approx(ensemble_by_hand(with_clip, data, 0.9), abs=2e-3)
    assert found != pytest.approx(ensemble_by_hand(with_clip, data, 0.9, others), abs=0.01)


def test_the_checkpoint_says_whether_to_ensemble(checkpoint, with_clip, data, tmp_path):
    def asked(model: Path, **options) -> tuple:
        result = evaluate(EvalArgs(model=str(model), dataset=str(data), max_images=1, **options))
        return result["clip_ensemble"], result["clip_ensemble_weight"]

    assert asked(checkpoint) == ("off", None)  # no image tower
    assert asked(with_clip) == ("crops", 0.8)
    assert asked(with_clip, ensemble_weight="0.7", ensemble="single_pass") == ("single_pass", 0.7)
    with pytest.raises(InputError, match="no image tower"):
        asked(checkpoint, ensemble="crops")
    shutil.copytree(with_clip, tmp_path / "copy")
    change_json(tmp_path / "copy" / "config.json", clip_ensemble_weight=None)
    assert asked(tmp_path / "copy") == ("off", None)
    assert asked(tmp_path / "copy", ensemble_weight="0.5") == ("crops", 0.5)
    with pytest.raises(InputError, match="says not to"):
        asked(tmp_path / "copy", ensemble="crops")
    with pytest.raises(InputError, match="^--ensemble_weight must be at most 1, got 1.5"):
        asked(with_clip, ensemble_weight="1.5")
    with pytest.raises(InputError, match=r"must be in \[0, 1\] or a file of zs3 ensemble_weight, got 'x.json'"):
        asked(with_clip, ensemble_weight="x.json")


def test_a_checkpoint_whose_config_asks_for_tuples_gets_the_same_scores(with_clip, data, tmp_path):
    shutil.copytree(with_clip, tmp_path / "copy")
    change_json(tmp_path / "copy" / "config.json", return_dict=False)
    one, other = (evaluate(EvalArgs(model=str(model), dataset=str(data))) for model in (with_clip, tmp_path / "copy"))
    assert one["miou"] is not None and one["per_class"] == other["per_class"]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_weight_may_come_from_the_file_that_chose_it(with_clip, data, tmp_path):
    path, ids = tmp_path / "weight.json", load_split(data, "validation").image_ids
    asked = {"split": "train", "unseen_labels": "runs/pseudo_labels"}
    answer = {"clip_ensemble_weight": 0.6, "weights": {}, "settings": asked, "dataset": data.name}
    answer |= {"checkpoint_sha256": sha256_of(with_clip / "model.safetensors"), "image_ids": [*ids[:1], "other"]}

    def evaluated(view: str | None = None, **changes) -> dict:
        path.write_text(json.dumps(answer | changes))
        return evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble=view, ensemble_weight=str(path)))

    found = evaluated()
    by_number = evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble_weight="0.6"))
    assert found["per_class"] == by_number["per_class"]
    assert (found["clip_ensemble"], found["clip_ensemble_weight"]) == ("crops", 0.6)
    where = f"chosen on 2 images of {data.name}, split train, with the image labels in pseudo_labels"
    assert f"weight 0.6, {where})" in found["protocol"] and "by hand" in by_number["protocol"]
    assert found["given_sha256"] == {str(path): sha256_of(path)}
    assert evaluated("single_pass")["clip_ensemble"] == "single_pass"

    none = evaluated(clip_ensemble_weight=None, settings=asked | {"unseen_labels": "ground_truth"})
    off = evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble="off"))
    assert (none["clip_ensemble"], none["clip_ensemble_weight"], none["per_class"]) == ("off", None, off["per_class"])
    told = f"chosen on 2 images of {data.name}, split train, with ground-truth image labels"
    assert f"no ensemble ({told})" in none["protocol"] and "no ensemble (" not in off["protocol"]
    with pytest.raises(InputError, match="weight.json says not to ensemble: leave --ensemble crops out, or give a"):
        evaluated("crops", clip_ensemble_weight=None)

    tuned = evaluated(settings=asked | {"split": "validation"})["calibration"]["ensemble_weight_chosen"]
    assert tuned == f"TUNED ON THE TEST IMAGES, 1 of {len(ids)}, with the image labels in pseudo_labels"
    others = evaluated(settings=asked | {"split": "validation"}, image_ids=["other"])
    assert others["calibration"]["ensemble_weight_chosen"].startswith("chosen on 1 images of")
    with pytest.raises(InputError, match="weight.json was chosen for another checkpoint: choose for this one with zs3"):
        evaluated(checkpoint_sha256="of another")
    for value in (7.0, "0.6", True):
        with pytest.raises(InputError, match="weight.json: its weight must be null or in"):
            evaluated(clip_ensemble_weight=value)
    path.write_text("{}")
    with pytest.raises(InputError, match="is no result file of zs3 ensemble_weight, it lacks 'clip_ensemble_weight'"):
        evaluate(EvalArgs(model=str(with_clip), dataset=str(data), ensemble_weight=str(path)))
    with pytest.raises(InputError, match="must be in .* or a file of zs3 ensemble_weight, got '0,6'"):
        EvalArgs(model=str(with_clip), dataset=str(data), ensemble_weight="0,6").check()


def biased_by_hand(checkpoint: Path, data: Path, gamma: float) -> dict[str, float | None]:
    """IoU of each class where gamma is taken off the dense scores of seen ones."""
    model, processor = loaded(checkpoint)
    seen = torch.tensor([name not in UNSEEN for name in CLASS_NAMES])

    @torch.inference_mode()
    def label_map(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        outputs = model(**processor(images=image))
        masks = dense_masks(outputs.mask_logits.double(), size)
        scores = torch.einsum("bqc,bqhw->bchw", outputs.class_logits.softmax(-1).double(), masks)[0]
        scores -= gamma * seen[:, None, None]
        return (scores >= scores.amax(0) - 1e-6).int().argmax(0).numpy()  # where no mask is, classes are equal

    return iou_of_maps(data, label_map)


@pytest.mark.parametrize("gamma", [0.3, -0.2])
def test_a_bias_is_taken_off_the_scores_of_seen_classes(checkpoint, data, gamma):
    result = evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), seen_bias=str(gamma)))
    assert result["per_class"] == pytest.approx(biased_by_hand(checkpoint, data, gamma), abs=2e-3)
    assert result["per_class"] != evaluate(EvalArgs(model=str(checkpoint), dataset=str(data)))["per_class"]
    assert result["calibration"]["seen_bias"] == gamma and "by hand" in result["protocol"]
    assert result["reliability"] is None  # the confidences are those of another winner


def test_the_curve_of_one_pass_is_that_of_a_pass_for_each_bias(checkpoint, data):
    args = EvalArgs(model=str(checkpoint), dataset=str(data))
    curve = evaluate(args)["seen_unseen_curve"]
    points = curve["points"]
    for place in np.linspace(0, len(points["gamma"]) - 1, 3).astype(int).tolist() + [
        points["gamma"].index(curve["best"]["gamma"])
    ]:
        args.seen_bias, args.calibration = str(points["gamma"][place]), False
        alone = evaluate(args)
        for name in ("miou_seen", "miou_unseen", "hiou", "miou"):
            assert points[name][place] == pytest.approx(alone[name], abs=1e-9)
    assert curve["best"]["hiou"] == max(points["hiou"])


def test_a_bias_says_what_its_choice_knew(checkpoint, data, tmp_path):
    """A scored split of five images; a training split of others, on which some of the seen classes are held out."""
    flags = {"model": str(checkpoint), "dataset": str(data)}
    write_dataset(tmp_path / "scenes", num_train=6, num_validation=1, seed=7)
    space = json.loads((data / "classes.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "less")
    held = load_label_space("scenes").seen[:3]
    change_json(tmp_path / "less" / "config.json", seen_class_names=load_label_space("scenes").seen[3:])
    (tmp_path / "classes.json").write_text(json.dumps(space | {"unseen": [*held, *UNSEEN]}))
    less = {"model": str(tmp_path / "less"), "label_space": str(tmp_path / "classes.json"), "without": list(UNSEEN)}
    train = {"dataset": str(tmp_path / "scenes"), "split": "train"}

    def told(name: str, **options) -> str:
        """What the best bias of an evaluation with these options says; the bias is that of the curve."""
        path = tmp_path / f"{name}.json"
        other = evaluate(EvalArgs(**flags | options, output=str(path)))
        found = evaluate(EvalArgs(**flags, seen_bias=str(path)))
        assert found["calibration"]["seen_bias"] == other["seen_unseen_curve"]["best"]["gamma"]
        assert found["calibration"]["seen_bias_chosen"] in found["protocol"]
        return found["calibration"]["seen_bias_chosen"]

    assert evaluate(EvalArgs(**flags))["calibration"]["seen_bias_chosen"] == "none"
    assert told("own").startswith("TUNED ON THE TEST IMAGES, 5 of 5, with labels of the unseen classes")
    assert told("fewer", max_images=3).startswith("TUNED ON THE TEST IMAGES, 3 of 5, with labels")
    assert told("other", **train).startswith("chosen on other images, with labels of the unseen classes (")
    assert told("held_out", **less).startswith("TUNED ON THE TEST IMAGES, 5 of 5, without labels of unseen classes")
    names = ", ".join(held)
    assert told("honest", **less | train) == (
        f"chosen on other images, on classes held out ({names}), without labels of unseen classes"
    )
    assert told("as_seen", **less | train | {"without": []}).startswith("chosen on other images, with labels")


def test_a_bias_of_what_cannot_have_one_is_refused(checkpoint, data, tmp_path):
    flags = {"model": str(checkpoint), "dataset": str(data)}
    evaluate(EvalArgs(**flags, output=str(tmp_path / "zs3.json"), setting="zs3"))
    result = evaluate(EvalArgs(**flags, output=str(tmp_path / "leak.json")))
    leak = result | {"trained_on_masks_of": CLASS_NAMES}
    (tmp_path / "leak.json").write_text(json.dumps(leak))
    for wrong, words in {
        "nan": "finite",
        "none.json": "cannot read",
        "zs3.json": "no curve",
        "leak.json": "saw masks",
    }.items():
        wrong = str(tmp_path / wrong) if "." in wrong else wrong
        with pytest.raises(InputError, match=words):
            evaluate(EvalArgs(**flags, seen_bias=wrong))
    for options in ({"setting": "zs3"}, {"setting": "ovs"}):
        with pytest.raises(InputError, match="--seen_bias"):
            EvalArgs(**flags, seen_bias="0.1", **options).check()


def test_images_without_unseen_classes_have_no_curve(checkpoint, data, tmp_path):
    for split in ("images", "labels"):
        shutil.copytree(data / "validation" / split, tmp_path / "validation" / split)
    shutil.copy(data / "classes.json", tmp_path)
    for path in (tmp_path / "validation" / "labels").iterdir():
        label = np.asarray(Image.open(path)).copy()
        label[np.isin(label, [CLASS_NAMES.index(name) for name in UNSEEN])] = 255
        Image.fromarray(label).save(path)
    args = EvalArgs(model=str(checkpoint), dataset=str(tmp_path), curves=str(tmp_path / "curves"))
    assert evaluate(args)["seen_unseen_curve"] is None
    assert [path.name for path in (tmp_path / "curves").iterdir()] == ["reliability.png"]


def test_code_that_is_older_than_the_evaluation_is_told(checkpoint, data, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "old")
    code = (tmp_path / "old" / "processing_zs3.py").read_text()
    (tmp_path / "old" / "processing_zs3.py").write_text(code.replace("is_seen: Tensor | None = None,", ""))
    args = EvalArgs(model=str(tmp_path / "old"), dataset=str(data), max_images=1)
    with pytest.raises(InputError, match="is older than this eval.py: copy"):
        evaluate(replace(args, trust_remote_code=True))
    evaluate(args)  # with this project's


def test_options_reach_what_they_are_for(checkpoint, data):
    def scored(**options) -> dict:
        return evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), **options))

    first, other = scored(), scored(absent="truth", seed=3, max_wrong=0.6)
    for absent, result in (("union", first), ("truth", other)):
        truth = np.concatenate([label.ravel() for _, label, _ in load_split(data, "validation")])
        counted = [v for n, v in result["per_class"].items() if v is not None]
        assert result["miou"] == pytest.approx(np.mean(counted))
        if absent == "truth":
            assert {n for n, v in result["per_class"].items() if v is not None} == {
                CLASS_NAMES[index] for index in np.unique(truth) if index != 255
            }
        assert result["seen_unseen_curve"]["absent"] == absent
        assert result["seen_unseen_curve"]["unbiased"]["miou"] == pytest.approx(result["miou"])
        for name, (low, high) in result["per_class_intervals"].items():
            assert low is None or low <= result["per_class"][name] + 1e-9 and result["per_class"][name] <= high + 1e-9
    assert first["confidence_intervals"] != scored(seed=3)["confidence_intervals"]
    assert (first["rejection"]["conformal"]["alpha"], other["rejection"]["conformal"]["alpha"]) == (0.1, 0.6)
    assert first["label_space_sha256"] == load_label_space("scenes").sha256


def test_names_left_out_are_no_candidates_and_their_pixels_outsiders(checkpoint, data):
    left_out = [CLASS_NAMES[0], CLASS_NAMES[5]]
    candidates = [name for name in CLASS_NAMES if name not in left_out]
    result = evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), without=left_out))
    assert result["per_class"] == pytest.approx(scores_by_hand(checkpoint, data, candidates))
    labels = np.concatenate([label.ravel() for _, label, _ in load_split(data, "validation")])
    outsiders = int(np.isin(labels, [0, 5]).sum())
    assert (result["rejection"]["outsiders"], result["rejection"]["insiders"]) == (
        outsiders,
        int((labels != 255).sum()) - outsiders,
    )
    assert 0 <= result["rejection"]["auroc"] <= 1
    other = [left_out[0].upper(), left_out[1].replace(" ", "  ")]
    assert (
        other != left_out
        and evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), without=other))["per_class"]
        == result["per_class"]
    )
    with pytest.raises(InputError, match="no such name"):
        evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), without=["nothing"]))
    with pytest.raises(InputError, match="no candidate is left"):
        evaluate(EvalArgs(model=str(checkpoint), dataset=str(data), setting="zs3", without=list(UNSEEN)))


def test_what_lies_beside_a_result(checkpoint, data, tmp_path):
    args = EvalArgs(model=str(checkpoint), dataset=str(data), output=str(tmp_path / "r.json"), curves=str(tmp_path))
    result = evaluate(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("r.csv", "r.json", "r.md", "r_images.npz", "reliability.png", "seen_unseen_curve.png")
    ]
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    told = {name: float(row["iou"]) if row["iou"] else None for name, row in rows.items()}
    assert told == pytest.approx(result["per_class"])
    assert {name for name, row in rows.items() if row["kind"] == "unseen"} == set(UNSEEN)
    areas = {name: [int(row[area]) for area in ("intersection", "truth", "predicted")] for name, row in rows.items()}
    truth = np.concatenate([label.ravel() for _, label, _ in load_split(data, "validation")])
    for index, name in enumerate(CLASS_NAMES):
        assert areas[name][1] == (truth == index).sum()
    text = (tmp_path / "r.md").read_text()
    assert f"| hIoU | {100 * result['hiou']:.1f} |" in text and f"{result['protocol']}." in text
    saved = load_images(tmp_path / "r_images.npz")
    assert sorted(saved.image_ids) == [f"{number:05d}" for number in range(5)]
    assert saved.class_names == CLASS_NAMES


@pytest.mark.parametrize(
    "options",
    [{}, {"setting": "zs3"}, {"setting": "ovs"}, {"seen_bias": "0.1", "without": ["sky"]}, {"ensemble": "off"}],
)
def test_a_result_is_of_its_declared_type_and_reads_as_it_was(with_clip, data, tmp_path, options):
    path = tmp_path / "r.json"
    result = evaluate(EvalArgs(model=str(with_clip), dataset=str(data), max_images=2, output=str(path), **options))
    assert first_wrong(result, Result) is None and list(result) == list(Result.__annotations__)
    assert read_result(path) == result and read_images(path, result).image_ids == ["00000", "00001"]
    assert result["things"] == [name for name in load_label_space("scenes").things if name in result["per_class"]]
    has_seen = options.get("setting", "gzs3") == "gzs3"
    assert (result["miou_seen_on_seen_pixels"] is not None) == has_seen
    assert (result["confidence_intervals"]["miou_seen_on_seen_pixels"] != [None, None]) == has_seen
    for name, are_things in (("miou_things", True), ("miou_stuff", False)):
        told = [iou for own, iou in result["per_class"].items() if (own in result["things"]) == are_things]
        assert result[name] == pytest.approx(np.mean([iou for iou in told if iou is not None]))
        assert None not in result["confidence_intervals"][name]


def test_two_processes_give_the_result_of_one(checkpoint, data, tmp_path):
    one = evaluate(EvalArgs(model=str(checkpoint), dataset=str(data)))
    words = ["--model", checkpoint, "--dataset", data, "--output", tmp_path / "two.json"]
    two = start_two("eval", words, tmp_path / "log")
    assert [ended(process) for process in two] == [0, 0], (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert one["num_images"] == 5


def test_pictures_are_drawn_evenly_over_the_split(checkpoint, data, tmp_path):
    args = EvalArgs(model=str(checkpoint), dataset=str(data), pictures=str(tmp_path), num_pictures=3)
    evaluate(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00002.png", "00004.png"]  # of 0 to 4


def test_a_model_that_saw_unseen_masks_gets_no_zero_shot_number(checkpoint, data, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "copy")
    change_json(model / "config.json", seen_class_names=CLASS_NAMES)
    with pytest.raises(InputError, match="trained on masks of"):
        evaluate(EvalArgs(model=str(model), dataset=str(data)))
    result = evaluate(EvalArgs(model=str(model), dataset=str(data), setting="ovs", max_images=1))
    assert result["miou"] is not None and result["miou_unseen"] is None and result["hiou"] is None
    assert result["trained_on_masks_of"] == CLASS_NAMES


def test_a_checkpoint_that_lacks_weights_gets_no_number(checkpoint, data, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "copy") / "model.safetensors"
    save_file({name: w for name, w in load_file(path).items() if "class_projection" not in name}, path)
    with pytest.raises(InputError, match="incomplete.*class_projection"):
        evaluate(EvalArgs(model=str(tmp_path / "copy"), dataset=str(data)))


def test_a_missing_checkpoint_is_one_line_and_exit_code_2(data, tmp_path, call):
    assert "none" in call(main, "--model", tmp_path / "none", "--dataset", data).refusal
