"""The tiny CLIP: its tokenizer, its doors, its loss, and how good the committed one is."""

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
)

from zs3.scenes import render, tiny_clip

FOLDER = Path(tiny_clip.__file__).parents[1] / "scenes_clip"


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


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
    made = tiny_clip.world_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    text = "There is a small striped star in the scene."
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_text_is_pooled_at_its_end(model, tokenizer):
    end = tokenizer.eos_token_id
    assert model.config.text_config.eos_token_id == end == len(tokenizer) - 1
    tokens = tokenizer("a photo of a striped star.", return_tensors="pt")
    assert tokens["input_ids"][0, -1] == end
    # All words count, the last one too: with the wrong pooling, words after the highest id are invisible.
    embeds = tiny_clip.class_text_embeds(model, tokenizer, ["striped star", "striped square", "dotted star"])
    assert (embeds @ embeds.T)[0, 1:].max() < 0.99


def test_padding_does_not_change_a_text(model, tokenizer):
    alone = tokenizer("a red star", return_tensors="pt")
    padded = tokenizer(["a red star", "this is a photo of a small striped star."], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_text_features(**alone).pooler_output
        torch.testing.assert_close(model.get_text_features(**padded).pooler_output[:1], expected, atol=1e-5, rtol=0)


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
    crop = tiny_clip.cut_out(image, (0, 0, 96, 96), Image.Resampling.BICUBIC)
    prepared = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    # Half a level: one of 255 levels is 0.0154 after the normalisation.
    torch.testing.assert_close(prepared, tiny_clip.pixel_values(crop[None]), atol=0.016, rtol=0)


def test_the_loss_is_clips_when_every_picture_has_its_own_text():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    logits = 5.0 * image @ text.T
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    actual = tiny_clip.contrastive_loss(image, text, torch.arange(6), torch.tensor(5.0))
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
    actual = tiny_clip.contrastive_loss(image, text, torch.tensor(target), torch.tensor(5.0))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_a_pool_of_crops_is_the_same_each_time_and_differs_from_the_next():
    first, again, other = (tiny_clip.draw_crops(0, number, 60) for number in (0, 0, 1))
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.name, again.name)
    assert not np.array_equal(first.pixels, other.pixels)


def test_training_names_far_more_than_the_classes():
    name = tiny_clip.draw_crops(0, 0, 1500).name
    assert len(np.unique(name)) > 85 > 4 * len(render.CLASS_NAMES)
    assert set(render.CLASS_NAMES) <= {render.WORLD_NAMES[number] for number in np.unique(name)}


def test_a_margin_widens_a_box_by_its_share_and_stays_in_the_picture():
    assert tiny_clip.widened((40, 40, 60, 50), 0.1) == (38, 39, 62, 51)
    assert tiny_clip.widened((0, 40, 96, 90), 0.2) == (0, 30, 96, 96)


def test_outside_the_mask_a_held_out_crop_has_the_mean_colour():
    box, mask = (tiny_clip.held_out_crops(0.3, 2, masked=masked).pixels.astype(int) for masked in (False, True))
    filled = (np.abs(mask - tiny_clip.MEAN_COLOUR) <= 1).all(axis=-1)
    assert 0.1 < filled.mean() < 0.8
    same = (np.abs(mask - box) <= 1).all(axis=-1)
    assert (filled | same).mean() > 0.8  # the rest lies on the border, where resizing mixes the two


@pytest.mark.parametrize("margin, masked", [(0.0, False), (0.1, False), (0.2, False), (0.3, False), (0.0, True)])
def test_the_committed_clip_names_held_out_crops(model, tokenizer, margin, masked):
    text = tiny_clip.class_text_embeds(model, tokenizer, render.CLASS_NAMES)
    crops = tiny_clip.held_out_crops(margin, 8, masked=masked)
    correct = (tiny_clip.image_embeds(model, crops.pixels) @ text.T).argmax(dim=1).numpy() == crops.name
    unseen = np.isin(crops.name, [render.CLASS_NAMES.index(name) for name in render.UNSEEN])
    assert correct.mean() >= 0.85
    assert correct[unseen].mean() >= 0.8


def test_shapes_of_one_colour_have_different_text_vectors(model, tokenizer):
    for attribute in render.ATTRIBUTES:
        square, circle = tiny_clip.class_text_embeds(model, tokenizer, [f"{attribute} square", f"{attribute} circle"])
        assert square @ circle < 0.9


def test_the_card_holds_the_numbers_of_the_result_file(tmp_path):
    shutil.copy(FOLDER / "results.json", tmp_path)
    tiny_clip.write_card(tmp_path)
    card = (FOLDER / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == card
    result = json.loads((FOLDER / "results.json").read_text())
    assert result["command"] in card
    for row in result["accuracy"].values():
        assert f"{row['unseen']:.3f}" in card


def test_the_committed_weights_stay_below_five_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5_000_000


def test_accuracies_count_each_group_by_itself():
    name = np.array([0, 6, 7, 16])  # grass, stone wall (unseen), red circle, red square (unseen)
    assert [render.CLASS_NAMES[n] for n in name] == ["grass", "stone wall", "red circle", "red square"]
    shares = tiny_clip.accuracies(np.array([True, False, False, True]), name)
    assert shares == {"all": 0.5, "seen": 0.5, "unseen": 0.5, "things": 0.5, "stuff": 0.5}
    shares = tiny_clip.accuracies(np.array([True, True, False, False]), name)
    assert shares == {"all": 0.5, "seen": 0.5, "unseen": 0.5, "things": 0.0, "stuff": 1.0}


def test_train_makes_a_whole_folder_and_refuses_to_overwrite_it(tmp_path, monkeypatch, call):
    monkeypatch.setattr(tiny_clip, "BATCH", 16)
    evaluate = tiny_clip.evaluate
    monkeypatch.setattr(tiny_clip, "evaluate", lambda *args: evaluate(*args, per_class=2))
    words = ["train", "--output", tmp_path / "clip", "--steps", "2"]
    assert call(tiny_clip.main, *words).code == 0
    assert {path.name for path in (tmp_path / "clip").iterdir()} >= {path.name for path in FOLDER.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    assert "steps 2" in (tmp_path / "clip" / "README.md").read_text()
    assert "exists already" in call(tiny_clip.main, *words).refusal


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--model", "nowhere"], "nowhere holds no model.safetensors"),
        (["evaluate"], "--model is missing"),
        (["train"], "--output is missing"),
        ([], "--command is missing"),
        (["play"], "--command must be one of train, evaluate, got 'play'"),
        (["train", "--seed", str(2**32)], "--seed must be at most 4,294,967,295, got 4294967296"),
        (["train", "--steps", "0"], "--steps must be 1 or more, got 0"),
        (["train", "--output", "clip", "--model", "other"], "`train` takes no --model: leave it out"),
        (["evaluate", "--model", "clip", "--output", "x"], "`evaluate` takes no --output: leave it out"),
        (["evaluate", "--model", "clip", "--steps", "3"], "`evaluate` takes no --steps: leave it out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, told, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    ended = call(tiny_clip.main, *words)
    assert ended.refusal.startswith(f"error: {told}") and ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
