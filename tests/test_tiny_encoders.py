"""The tiny encoders: their tokenizers, doors, losses and pictures, and how good the committed ones are."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    Tipsv2Model,
)
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer

from zs3.label_space import load_label_space
from zs3.scenes import crops as pictures
from zs3.scenes import encoder_accuracy, render, tiny_clip, tiny_encoders, tiny_tipsv2
from zs3.scenes.captions import CAPTIONS, clip_tokenizer, tipsv2_tokenizer
from zs3.scenes.contrastive import PEAK_RATE, contrastive_loss, make_optimizer, unit

PLACE = Path(tiny_clip.__file__).parents[1]
FOLDER, UNSEEN_FOLDER, TIPSV2_FOLDER = (PLACE / f"scenes_{name}" for name in ("clip", "clip_unseen", "tipsv2"))
FOLDERS = (FOLDER, UNSEEN_FOLDER, TIPSV2_FOLDER)


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tipsv2() -> Tipsv2Model:
    return Tipsv2Model.from_pretrained(TIPSV2_FOLDER).eval()


# ---- texts -------------------------------------------------------------------------------------------------


def test_no_caption_is_a_bare_name():
    assert all(len(caption.split()) >= 3 for caption in CAPTIONS)
    assert all(caption.count("{}") == 1 for caption in CAPTIONS)


def test_every_word_of_the_world_is_one_token(tokenizer):
    for name in render.WORLD_NAMES:
        assert len(tokenizer(name)["input_ids"]) == 2 + len(name.split())


@pytest.mark.parametrize("text", ["zebra crossing", "Tür, 7 €", "猫", "wall-concrete", "stop sign/light"])
def test_any_text_can_be_written_and_read_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_capital_letters_make_no_difference(tokenizer):
    assert tokenizer("A Photo of a RED Star.")["input_ids"] == tokenizer("a photo of a red star.")["input_ids"]


def test_the_committed_tokenizer_is_the_one_the_code_makes(tokenizer):
    made = clip_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    text = "There is a small striped star in the scene."
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_tokenizer_of_the_tiny_tipsv2_is_the_one_the_code_makes():
    made, saved = tipsv2_tokenizer(), Tipsv2Tokenizer.from_pretrained(TIPSV2_FOLDER)
    for text in ("There is a small striped star in the scene.", "Zebra, Tür 7 €"):
        assert made(text)["input_ids"] == saved(text)["input_ids"]
        assert made.unk_token_id not in made(text)["input_ids"]
    for name in render.WORLD_NAMES:
        assert len(made(name.upper())["input_ids"]) == len(name.split())


def test_text_is_pooled_at_its_end(model, tokenizer):
    end = tokenizer.eos_token_id
    assert model.config.text_config.eos_token_id == end == len(tokenizer) - 1
    tokens = tokenizer("a photo of a striped star.", return_tensors="pt")
    assert tokens["input_ids"][0, -1] == end
    # All words count, the last one too: with the wrong pooling, words after the highest id are invisible.
    embeds = encoder_accuracy.class_text_embeds(model, tokenizer, ["striped star", "striped square", "dotted star"])
    assert (embeds @ embeds.T)[0, 1:].max() < 0.99


def test_padding_does_not_change_a_text(model, tokenizer):
    alone = tokenizer("a red star", return_tensors="pt")
    padded = tokenizer(["a red star", "this is a photo of a small striped star."], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_text_features(**alone).pooler_output
        torch.testing.assert_close(model.get_text_features(**padded).pooler_output[:1], expected, atol=1e-5, rtol=0)


def test_padding_does_not_change_a_text_of_the_tiny_tipsv2(tipsv2):
    tokens = tipsv2_tokenizer()(["a red star", "this is a photo of a small striped star."], padding=True)
    ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
    assert (mask[0] == 0).any()
    with torch.inference_mode():
        alone = tipsv2.get_text_features(ids[:1, : mask[0].sum()]).pooler_output
        torch.testing.assert_close(tipsv2.get_text_features(ids, mask).pooler_output[:1], alone, atol=1e-4, rtol=0)


# ---- doors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_weights_are_small_files_and_load_as_float32(folder):
    model, _ = tiny_encoders.load(folder)
    assert model.dtype == torch.float32 and all(value.isfinite().all() for value in model.state_dict().values())
    assert max(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    assert sum(path.stat().st_size for other in FOLDERS for path in other.iterdir()) < 12_000_000


def test_each_tower_loads_by_itself_and_gives_the_same_vectors(model, tokenizer):
    text_tower = CLIPTextModelWithProjection.from_pretrained(FOLDER).eval()
    image_tower = CLIPVisionModelWithProjection.from_pretrained(FOLDER).eval()
    tokens = tokenizer(["a red star", "stone wall"], padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        both = model(**tokens, pixel_values=pixels)
        torch.testing.assert_close(F.normalize(text_tower(**tokens).text_embeds, dim=-1), both.text_embeds)
        torch.testing.assert_close(F.normalize(image_tower(pixels).image_embeds, dim=-1), both.image_embeds)


def test_the_image_processor_of_the_folder_prepares_what_training_prepared():
    processor = CLIPImageProcessor.from_pretrained(FOLDER)
    image = render.render_scene(0, 0).image
    crop = pictures.cut_out(image, (0, 0, render.SIZE, render.SIZE), Image.Resampling.BICUBIC)
    prepared = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    # Half a level: one of 255 levels is 0.0154 after the normalisation.
    torch.testing.assert_close(prepared, tiny_clip.pixel_values(crop[None]), atol=0.016, rtol=0)


def test_the_loss_is_clips_when_every_picture_has_its_own_text():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    logits = 5.0 * image @ text.T
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    actual = contrastive_loss(image, text, torch.arange(6), torch.tensor(5.0))
    torch.testing.assert_close(actual, expected)


def test_the_loss_of_a_text_with_several_pictures_equals_the_loops():
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (5, 3))
    target = [0, 2, 1, 0, 0]
    logits = (5.0 * image @ text.T).tolist()
    of_images = [math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(logits, target, strict=True)]
    of_texts = []
    for n in range(3):
        total = math.log(sum(math.exp(row[n]) for row in logits))
        own = [total - row[n] for row, t in zip(logits, target, strict=True) if t == n]
        of_texts.append(sum(own) / len(own))
    expected = (sum(of_images) / 5 + sum(of_texts) / 3) / 2
    actual = contrastive_loss(image, text, torch.tensor(target), torch.tensor(5.0))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_a_pool_of_crops_is_the_same_each_time_and_differs_from_the_next():
    first, again, other = (pictures.draw_crops(0, number, 60) for number in (0, 0, 1))
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.name, again.name)
    assert not np.array_equal(first.pixels, other.pixels)


def test_training_names_far_more_than_the_classes():
    name = pictures.draw_crops(0, 0, 700).name
    assert len(np.unique(name)) > 90
    assert set(render.CLASS_NAMES) <= {render.WORLD_NAMES[number] for number in np.unique(name)}


def test_a_margin_widens_a_box_by_its_share_and_stays_in_the_picture():
    assert pictures.widened((40, 40, 60, 50), 0.1) == (38, 39, 62, 51)
    assert pictures.widened((0, 40, 128, 120), 0.2) == (0, 24, 128, 128)


def test_outside_the_mask_a_held_out_crop_has_the_mean_colour():
    box, mask = (pictures.held_out_crops(0.3, 2, masked=masked).pixels.astype(int) for masked in (False, True))
    filled = (np.abs(mask - pictures.MEAN_COLOUR) <= 1).all(axis=-1)
    assert 0.1 < filled.mean() < 0.8
    same = (np.abs(mask - box) <= 1).all(axis=-1)
    assert (filled | same).mean() > 0.8  # the rest lies on the border, where resizing mixes the two


def test_a_hidden_name_has_no_crop():
    hidden = frozenset(load_label_space("scenes:0").unseen)
    name = pictures.draw_crops(0, 0, 400, hidden).name
    shown = {render.WORLD_NAMES[number] for number in name}
    assert shown.isdisjoint(hidden) and set(render.CLASS_NAMES) - hidden <= shown


def test_a_proposal_like_mask_belongs_mostly_to_its_name():
    rng = np.random.default_rng(0)
    purities, sizes = [], []
    for index in range(60):
        scene = render.render_scene(5, index)
        names = np.array([region.name for region in scene.regions])
        for place, region in enumerate(scene.regions):
            if (scene.owner == place).sum() < 200:
                continue
            mask = pictures.like_a_proposal(rng, scene, place)
            own = names[scene.owner] == region.name
            purities.append((mask & own).sum() / max(mask.sum(), 1))
            sizes.append(mask.sum() / own.sum())
    assert np.median(purities) > 0.85 and np.mean(np.array(purities) > 0.5) > 0.95
    assert 0.1 < np.mean(np.array(purities) < 0.9) < 0.7  # rough ones are among them
    assert np.quantile(sizes, 0.1) < 0.7 and np.quantile(sizes, 0.9) > 1.0  # parts, and more than the region


# ---- boxes of the tiny TIPSv2 -------------------------------------------------------------------------------


def test_the_tokens_of_a_box_are_those_that_pixels_say():
    box = (13, 40, 61, 88)
    inside = np.zeros((render.SIZE, render.SIZE))
    inside[box[1] : box[3], box[0] : box[2]] = 1
    grid, patch = tiny_tipsv2.GRID, tiny_tipsv2.PATCH
    expected = inside.reshape(grid, patch, grid, patch).mean(axis=(1, 3)).ravel()
    assert np.allclose(tiny_tipsv2.covered(box), expected)


def test_a_box_in_front_takes_tokens_from_those_behind_it():
    sky = render.Region("sky", (0, 0, 128, 128))
    behind, front = (render.Region(f"red {shape}", (32, 32, 64, 64)) for shape in ("circle", "star"))
    boxes = tiny_tipsv2.boxes_of([sky, behind, front])
    inside = tiny_tipsv2.covered(front.box) >= 0.5
    assert (boxes.weight[0] == 0).tolist() == inside.tolist()
    assert boxes.weight[1].sum() == 0 and np.isclose(boxes.weight[2].sum(), 1) and boxes.touched[1].any()
    grid = boxes.weight[2].reshape(16, 16)
    assert grid[5, 5] > grid[4, 4] > 0  # more in the middle of the box


def a_batch_of_boxes() -> tuple[torch.Tensor, ...]:
    """logits (2, 5, 3), and the scene, target and touched tokens of four boxes."""
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    touched = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    return logits, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 0]), touched


def names_of_tokens() -> dict[tuple[int, int], set[int]]:
    _, scene, target, touched = a_batch_of_boxes()
    return {
        (b, t): {int(target[r]) for r in range(4) if scene[r] == b and touched[r, t]}
        for b in range(2)
        for t in range(5)
    }


def test_the_loss_of_tokens_equals_the_loops():
    logits, scene, target, touched = a_batch_of_boxes()
    losses = []
    for (b, t), names in names_of_tokens().items():
        weights = [math.exp(value) for value in logits[b, t].tolist()]
        losses.append(-math.log(sum(weights[n] for n in names) / sum(weights)))
    expected = sum(losses) / len(losses)
    possible = tiny_tipsv2.possible_names(scene, target, touched, 2, 3)
    assert tiny_tipsv2.token_loss(logits, possible).item() == pytest.approx(expected, rel=1e-9)


# ---- how good the committed ones are ------------------------------------------------------------------------


@pytest.mark.parametrize("margin, masked", [(0.0, False), (0.1, False), (0.2, False), (0.0, True)])
def test_the_committed_clip_names_held_out_crops(model, tokenizer, margin, masked):
    text = encoder_accuracy.class_text_embeds(model, tokenizer, render.CLASS_NAMES)
    crops = pictures.held_out_crops(margin, 8, masked=masked)
    correct = (encoder_accuracy.crop_embeds(model, crops.pixels) @ text.T).argmax(dim=1).numpy() == crops.name
    unseen = np.isin(crops.name, [render.CLASS_NAMES.index(name) for name in render.UNSEEN])
    assert correct.mean() >= 0.85
    assert correct[unseen].mean() >= 0.8


def test_the_committed_tipsv2_names_masks(tipsv2, monkeypatch):
    monkeypatch.setattr(encoder_accuracy, "PER_CLASS", 10)
    text = encoder_accuracy.class_text_embeds(tipsv2, tipsv2_tokenizer(), render.CLASS_NAMES)
    scores, by_name = encoder_accuracy.tipsv2_accuracy(tipsv2, text)
    assert scores["mask"]["all"] >= 0.8 and list(by_name) == render.CLASS_NAMES


def test_the_mean_of_a_mask_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    tokens, masks = torch.randn(16, 5, generator=generator), torch.rand(2, 8, 8, generator=generator)
    for mask, mean in zip(masks, encoder_accuracy.mask_means(tokens, masks), strict=True):
        total = torch.zeros(5)
        for y in range(8):
            for x in range(8):
                total += mask[y, x] * tokens[(y // 2) * 4 + x // 2]
        torch.testing.assert_close(mean, total / total.norm(), atol=1e-5, rtol=0)


def test_shapes_of_one_colour_have_different_text_vectors(model, tokenizer):
    for attribute in render.ATTRIBUTES:
        square, circle = encoder_accuracy.class_text_embeds(
            model, tokenizer, [f"{attribute} square", f"{attribute} circle"]
        )
        assert square @ circle < 0.9


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_card_holds_the_numbers_of_the_result_file(folder, tmp_path):
    result = json.loads((folder / "results.json").read_text())
    tiny_encoders.write_card(tmp_path, result)
    card = (folder / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == card
    assert result["command"] in card
    for row in (*result["accuracy"].values(), *result["proposals"]["accuracy"].values()):
        assert f"{row['unseen']:.3f}" in card


def test_the_card_of_the_clip_without_unseen_names_says_so():
    unseen = load_label_space("scenes:0").unseen
    assert json.loads((UNSEEN_FOLDER / "results.json").read_text())["hidden_names"] == sorted(unseen)
    assert ", ".join(sorted(unseen)) in (UNSEEN_FOLDER / "README.md").read_text().replace("\n", " ")


def test_accuracies_count_each_group_by_itself():
    name = np.array([0, 3, 8, 9])
    assert [render.CLASS_NAMES[n] for n in name] == ["grass", "water", "red circle", "red square"]
    assert {"water", "red square"} <= set(render.UNSEEN)
    shares = encoder_accuracy.accuracies(np.array([True, False, False, True]), name)
    assert shares == {"all": 0.5, "seen": 0.5, "unseen": 0.5, "things": 0.5, "stuff": 0.5}
    shares = encoder_accuracy.accuracies(np.array([True, True, False, False]), name)
    assert shares == {"all": 0.5, "seen": 0.5, "unseen": 0.5, "things": 0.0, "stuff": 1.0}
    assert encoder_accuracy.accuracies(np.array([True]), name[:1])["unseen"] is None


# ---- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "folder"), [("clip", UNSEEN_FOLDER), ("tipsv2", TIPSV2_FOLDER)])
def test_train_makes_a_whole_folder_and_refuses_to_overwrite_it(family, folder, tmp_path, monkeypatch, call):
    monkeypatch.setattr(tiny_clip, "BATCH", 16)
    monkeypatch.setattr(tiny_tipsv2, "SCENES", 2)
    monkeypatch.setattr(tiny_tipsv2, "CROPS", 8)
    monkeypatch.setattr(encoder_accuracy, "PER_CLASS", 2)
    words = ["train", "--family", family, "--output", tmp_path / "made", "--steps", "2"]
    words += ["--without", "scenes:0"] if family == "clip" else []
    assert call(tiny_encoders.main, *words).code == 0
    assert {path.name for path in (tmp_path / "made").iterdir()} == {path.name for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert "--steps 2" in (tmp_path / "made" / "README.md").read_text()
    assert "exists already" in call(tiny_encoders.main, *words).refusal
    before = json.loads((tmp_path / "made" / "results.json").read_text())
    assert call(tiny_encoders.main, "evaluate", "--model", tmp_path / "made").code == 0
    assert json.loads((tmp_path / "made" / "results.json").read_text()) == before


def test_the_same_seed_trains_the_same_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_tipsv2, "SCENES", 2)
    monkeypatch.setattr(tiny_tipsv2, "CROPS", 8)
    first, again = (tiny_tipsv2.train(tmp_path / name, 2, seed=3).state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_proposals_of_a_checkpoint_are_named(monkeypatch, tipsv2, model, tokenizer):
    monkeypatch.setattr(encoder_accuracy, "NUM_SCENES", 2)
    text = encoder_accuracy.class_text_embeds(tipsv2, tipsv2_tokenizer(), render.CLASS_NAMES)
    checkpoint = str(PLACE.parent / "hub_cards" / "zs3-scenes")
    namings = encoder_accuracy.tipsv2_namings(tipsv2)
    found, shares = encoder_accuracy.proposal_accuracy(checkpoint, namings, text)
    assert set(shares) == {"0.85", "0.5"} and 0 < shares["0.85"] <= shares["0.5"] <= 1
    assert set(found) == {f"proposals, patch tokens, purity {purity}" for purity in (0.85, 0.5)}
    for proposals in encoder_accuracy.propose(checkpoint):
        for embeds in (*namings.values(), *encoder_accuracy.clip_namings(model).values()):
            vectors = embeds(proposals)
            assert vectors.shape[0] == len(proposals.name)
            torch.testing.assert_close(unit(vectors), vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--model", "nowhere"], "nowhere/results.json is missing: give a folder that `train` made"),
        (["evaluate"], "--model is missing"),
        (["train"], "--output is missing"),
        ([], "--command is missing"),
        (["play"], "--command must be one of train, evaluate, got 'play'"),
        (["train", "--seed", str(2**32)], "--seed must be at most 4,294,967,295, got 4294967296"),
        (["train", "--steps", "0"], "--steps must be 1 or more, got 0"),
        (["train", "--output", "clip", "--model", "other"], "`train` takes no --model: leave it out"),
        (["evaluate", "--model", "clip", "--output", "x"], "`evaluate` takes no --output: leave it out"),
        (["evaluate", "--model", "clip", "--steps", "3"], "`evaluate` takes no --steps: leave it out"),
        (["train", "--output", "clip", "--proposals", "x"], "`train` takes no --proposals: leave it out"),
        (["train", "--output", "x", "--without", "nowhere"], "label space nowhere is none of the scenes: give scenes"),
        (["train", "--output", "x", "--without", "voc_20"], "label space voc_20 is none of the scenes: give scenes"),
        (["train", "--output", "x", "--family", "tipsv2", "--without", "scenes:0"], "--without is for --family clip"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, told, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    ended = call(tiny_encoders.main, *words)
    assert ended.refusal.startswith(f"error: {told}") and ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, file: str, content: str | None) -> None:
    """Writes `content` into a file of the folder; None: removes it."""
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("results.json", "none", "is no JSON"),
        ("results.json", "[1]", "it holds no mapping"),
        ("results.json", "{}", "command is missing"),
        ("model.safetensors", "none", "give a folder that `train` made"),
        ("model.safetensors", None, "give a folder that `train` made"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("config.json", "[]", "give a folder that `train` made"),
    ],
)
def test_a_damaged_folder_is_refused_and_left_as_it_was(file, content, told, tmp_path, call):
    shutil.copytree(FOLDER, tmp_path / "clip")
    damage(tmp_path / "clip", file, content)
    before = {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()}
    assert told in call(tiny_encoders.main, "evaluate", "--model", tmp_path / "clip").refusal
    assert {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()} == before


def test_a_checkpoint_without_proposals_is_refused_before_the_measuring(call):
    ended = call(tiny_encoders.main, "evaluate", "--model", FOLDER, "--proposals", UNSEEN_FOLDER)
    assert "--proposals" in ended.refusal and "not of 'zs3'" in ended.refusal and ended.err.count("\n") == 1


@pytest.mark.parametrize("steps", [1, 2, 30, 4000])
def test_the_learning_rate_rises_to_its_peak_and_ends_at_zero(steps):
    model = torch.nn.Linear(1, 1)
    optimizer, schedule = make_optimizer(model, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert rates[0] > 0 and max(rates) == pytest.approx(PEAK_RATE)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert steps == 1 or optimizer.param_groups[0]["lr"] == pytest.approx(0)
