"""What CLIP sees of proposals, against literal loops: a box, a crop, a token, a class at a time."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import clip_views_zs3
from clip_views_zs3 import crop_proposals, ensemble_with_clip, mask_boxes
from encoders_zs3 import region_vectors
from outputs_zs3 import Zs3Output
from tests.tiny import tiny_model

MEAN, STD = (torch.tensor(values, dtype=torch.float64) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
D, SIDE = 12, 16  # of the tiny image tower


@pytest.fixture(scope="module")
def model():
    return tiny_model(vision=True)


def pixels_of(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) RGB in [0, 1], as CLIP takes it."""
    return ((image.double() - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).float()


def random_masks(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rectangles with holes, the first one pixel large, the second the whole picture."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(number, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        bottom = top + 1 + int(torch.randint(height - top, (), generator=generator))
        right = left + 1 + int(torch.randint(width - left, (), generator=generator))
        mask[top:bottom, left:right] = torch.rand(bottom - top, right - left, generator=generator) < 0.7
        mask[top, left] = True  # no mask is empty
    masks[0] = False
    masks[0, height // 2, width // 3] = True
    masks[1] = True
    return masks


def literal_crop(image: torch.Tensor, mask: torch.Tensor, size: int, fill: str | None) -> torch.Tensor:
    """As Xu et al. 2021 do it, one proposal after the other: box, fill, 0..255, normalise, resize; in float64."""
    image = image.double()
    ys, xs = zip(*mask.nonzero().tolist(), strict=True)
    top, bottom, left, right = min(ys), max(ys) + 1, min(xs), max(xs) + 1
    region = 255 * image[:, top:bottom, left:right]
    if fill is not None:
        inside = mask[top:bottom, left:right]
        region = region * inside + 255 * MEAN.view(3, 1, 1) * ~inside
    region = (region - 255 * MEAN.view(3, 1, 1)) / (255 * STD.view(3, 1, 1))
    return F.interpolate(region[None], size=(size, size), mode="bicubic", align_corners=False)[0].float()


@pytest.mark.parametrize("fill", ["mean", None])
def test_crops_are_those_of_a_literal_loop_over_boxes(fill):
    image, masks = torch.rand(3, 61, 90), random_masks(21, 61, 90)
    crops = crop_proposals(pixels_of(image), masks, 24, fill=fill)
    for crop, mask in zip(crops, masks, strict=True):
        torch.testing.assert_close(crop, literal_crop(image, mask, 24, fill), atol=1e-5, rtol=0)


def test_crops_of_a_large_picture_at_clips_size_are_those_of_the_loop():
    image, masks = torch.rand(3, 480, 640), random_masks(4, 480, 640, seed=3)
    crops = crop_proposals(pixels_of(image), masks, 224)
    for crop, mask in zip(crops, masks, strict=True):
        torch.testing.assert_close(crop, literal_crop(image, mask, 224, "mean"), atol=1e-5, rtol=0)


def test_nothing_to_crop_gives_no_crops():
    assert crop_proposals(torch.rand(3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool), 16).shape == (0, 3, 16, 16)
    assert mask_boxes(torch.zeros(0, 8, 8, dtype=torch.bool)).shape == (0, 4)


def literal_embeds(model, images, mask_logits, valid_sizes, fill, threshold):
    """(B, Q, D), a proposal at a time; None where its mask is empty."""
    embeds = []
    for image, logits, (height, width) in zip(images, mask_logits, valid_sizes, strict=True):
        for one in logits:
            whole = (4 * one.shape[0], 4 * one.shape[1])
            probs = F.interpolate(one[None, None], size=whole, mode="bilinear", align_corners=False)[0, 0].sigmoid()
            mask = probs[:height, :width] > threshold
            if not mask.any():
                embeds.append(None)
                continue
            crop = literal_crop(image[:, :height, :width], mask, SIDE, fill)
            with torch.no_grad():
                embed = model.vision_model(pixel_values=crop[None]).image_embeds[0]
            embeds.append(embed / embed.norm())
    return embeds


def proposals(seed: int = 0):
    """Two padded pictures; the third query is nowhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 5, 3, 4, generator=generator)
    mask_logits = 4 * F.interpolate(coarse, size=(16, 24), mode="bilinear", align_corners=False)
    mask_logits[:, 2] = -5
    return torch.rand(2, 3, 64, 96, generator=generator), mask_logits, torch.tensor([[64, 70], [41, 96]])


@pytest.mark.parametrize(("fill", "threshold"), [("mean", 0.5), (None, 0.3)])
def test_embeds_are_those_of_a_loop_over_proposals_and_empty_ones_are_flagged(model, fill, threshold, monkeypatch):
    monkeypatch.setattr(clip_views_zs3, "CROPS_FOR_TOWER", 3)  # so that several batches are needed
    images, mask_logits, valid_sizes = proposals()
    result = model.embed_proposals(images, mask_logits, valid_sizes, fill=fill, mask_threshold=threshold)
    expected = literal_embeds(model, images, mask_logits, valid_sizes.tolist(), fill, threshold)
    assert result.shown.flatten().tolist() == [embed is not None for embed in expected]
    assert not result.shown[:, 2].any() and result.shown.sum() >= 6
    for embed, own in zip(result.embeds.flatten(0, 1), expected, strict=True):
        torch.testing.assert_close(embed, torch.zeros(D) if own is None else own, atol=1e-5, rtol=0)


def test_only_chosen_proposals_are_looked_at(model, monkeypatch):
    images, mask_logits, valid_sizes = proposals()
    chosen = torch.zeros(2, 5, dtype=torch.bool)
    chosen[0, 1] = chosen[1, 4] = chosen[1, 2] = True
    everything = model.embed_proposals(images, mask_logits, valid_sizes)
    seen = []
    forward = model.vision_model.forward
    monkeypatch.setattr(model.vision_model, "forward", lambda pixels: seen.append(len(pixels)) or forward(pixels))
    some = model.embed_proposals(images, mask_logits, valid_sizes, chosen=chosen)
    assert some.shown.nonzero().tolist() == [[0, 1], [1, 4]] and seen == [2]
    torch.testing.assert_close(some.embeds[some.shown], everything.embeds[some.shown])
    assert (some.embeds[~some.shown] == 0).all()


@pytest.mark.parametrize("view", ["crops", "single_pass", "mixed"])
def test_pictures_without_a_proposal_to_look_at_are_no_error(model, view):
    images, mask_logits, valid_sizes = proposals()
    one = torch.zeros(2, 5, dtype=torch.bool)
    one[1, 0] = True
    assert model.embed_proposals(images, mask_logits, valid_sizes, view=view, chosen=one).shown.sum() == 1
    nothing = model.embed_proposals(images, torch.full_like(mask_logits, -9), valid_sizes, view=view)
    assert not nothing.shown.any() and (nothing.embeds == 0).all()


def test_mixed_views_are_crops_of_the_largest_and_one_pass_for_the_others(model, monkeypatch):
    """Widest by a count of pixels; what is not to be looked at owns none. With few proposals all of them are crops."""
    images, mask_logits, valid_sizes = proposals()
    chosen = torch.tensor([[True, True, True, True, False], [True, True, False, True, True]])
    views = {
        view: model.embed_proposals(images, mask_logits, valid_sizes, view=view, chosen=chosen)
        for view in ("crops", "single_pass", "mixed")
    }
    assert torch.equal(views["mixed"].embeds, views["crops"].embeds)
    monkeypatch.setattr(clip_views_zs3, "LARGEST", 2)
    mixed = model.embed_proposals(images, mask_logits, valid_sizes, view="mixed", chosen=chosen)
    assert torch.equal(mixed.shown, views["crops"].shown)
    for image in range(2):
        shown = mixed.shown[image].nonzero()[:, 0].tolist()
        height, width = valid_sizes[image].tolist()
        owned = Counter(
            max(shown, key=lambda query: float(mask_logits[image, query, row, column]))  # noqa: B023
            for row in range(math.ceil(height / 4))
            for column in range(math.ceil(width / 4))
        )
        largest = sorted(shown, key=lambda query: -owned[query])[:2]  # noqa: B023
        for query in range(5):
            kind = "crops" if query in largest else "single_pass"
            torch.testing.assert_close(mixed.embeds[image, query], views[kind].embeds[image, query])


def test_crops_are_cut_in_float32_whatever_is_asked_of_the_tower():
    image, masks = torch.rand(3, 61, 90).bfloat16(), random_masks(5, 61, 90)
    exact = crop_proposals(pixels_of(image), masks, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_proposals(pixels_of(image), masks, 24), exact)


@pytest.mark.parametrize("view", ["crops", "single_pass", "mixed"])
def test_half_precision_is_near(model, view):
    images, mask_logits, valid_sizes = proposals()
    exact = model.embed_proposals(images, mask_logits, valid_sizes, view=view)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.embed_proposals(images, mask_logits, valid_sizes, view=view)
    assert half.embeds.dtype == torch.float32
    assert not torch.equal(half.embeds, exact.embeds)
    torch.testing.assert_close(half.embeds, exact.embeds, atol=0.05, rtol=0)


# ---------------------------------------------------------------------------------------------------- the ensemble


def test_the_ensemble_is_its_formula_in_loops():
    class_probs, clip_probs = torch.rand(2, 3, 4).softmax(-1), torch.rand(2, 3, 4).softmax(-1)
    is_seen = torch.tensor([True, False, True, False])
    result = ensemble_with_clip(class_probs, clip_probs, is_seen, 0.8)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        p, s = float(class_probs[tuple(index)]), float(clip_probs[tuple(index)])
        expected = p**0.8 * s**0.2 if is_seen[index[2]] else p**0.2 * s**0.8
        assert float(result[tuple(index)]) == pytest.approx(expected, rel=1e-5)


def test_the_ensemble_is_a_table_worked_by_hand():
    """w = 0.75: seen p^(3/4) s^(1/4), unseen p^(1/4) s^(3/4); numbers whose fourth roots are whole."""
    #                      seen                    unseen
    class_probs = torch.tensor([[[81.0, 16.0], [1.0, 625.0], [0.0, 256.0]]]) / 10_000  # roots 3, 2; 1, 5; 0, 4: / 10
    clip_probs = torch.tensor([[[1.0, 256.0], [16.0, 1.0], [81.0, 10_000.0]]]) / 10_000  # roots 1, 4; 2, 1; 3, 10
    by_hand = (
        torch.tensor(
            [
                [
                    [3 * 3 * 3 * 1, 2 * 4 * 4 * 4],
                    [1 * 1 * 1 * 2, 5 * 1 * 1 * 1],
                    [0, 4 * 10 * 10 * 10],  # an empty mask has s = 1
                ]
            ]
        )
        / 10_000
    )
    result = ensemble_with_clip(class_probs, clip_probs, torch.tensor([True, False]), 0.75)
    torch.testing.assert_close(result, by_hand, atol=1e-6, rtol=1e-5)


def test_the_models_ensemble_is_crops_softmax_and_formula_one_proposal_at_a_time(model):
    images, mask_logits, valid_sizes = proposals()
    text = F.normalize(torch.randn(6, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    is_seen = torch.tensor([True, True, False, True, False, True])
    outputs = Zs3Output(
        mask_logits=mask_logits,
        valid_sizes=valid_sizes,
        class_logits=torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(6)),
    )
    made = model.embed_proposals(images, mask_logits, valid_sizes)
    result = model.ensemble(outputs, made, text, is_seen=is_seen, weight=0.7)
    embeds = literal_embeds(model, images, mask_logits, valid_sizes.tolist(), "mean", 0.5)
    for place, embed in enumerate(embeds):
        p = outputs.class_logits.flatten(0, 1)[place].softmax(-1)
        s = torch.ones(6) if embed is None else (100 * text @ embed).softmax(-1)
        expected = torch.where(is_seen, p**0.7 * s**0.3, p**0.3 * s**0.7)
        torch.testing.assert_close(result.class_probs.flatten(0, 1)[place], expected, atol=1e-5, rtol=1e-3)
    assert result.shown_to_clip.flatten().tolist() == [embed is not None for embed in embeds]
    again = model.ensemble(result, made, text, is_seen=is_seen, weight=0.7)  # an ensemble of an ensemble is none
    torch.testing.assert_close(again.class_probs, result.class_probs)
    by_config = model.ensemble(outputs, made, text, is_seen=is_seen)
    torch.testing.assert_close(
        by_config.class_probs, model.ensemble(outputs, made, text, is_seen=is_seen, weight=0.8).class_probs
    )


def test_a_wrong_weight_a_missing_tower_and_unknown_seen_classes_are_refused(model):
    images, mask_logits, valid_sizes = proposals()
    outputs = Zs3Output(mask_logits=mask_logits, valid_sizes=valid_sizes, class_logits=torch.zeros(2, 5, 2))
    text, is_seen = torch.eye(2, D), torch.tensor([True, False])
    made = model.embed_proposals(images, mask_logits, valid_sizes)
    with pytest.raises(ValueError, match="weight must be at most 1, got 1.2"):
        model.ensemble(outputs, made, text, is_seen=is_seen, weight=1.2)
    with pytest.raises(ValueError, match="pass is_seen"):
        model.ensemble(outputs, made, text)
    with pytest.raises(ValueError, match="is_seen must be"):
        model.ensemble(outputs, made, text, is_seen=torch.tensor([True]))
    with pytest.raises(ValueError, match="got Tensor: give it model.embed_proposals"):
        model.ensemble(outputs, images, text, is_seen=is_seen)
    with pytest.raises(ValueError, match="no image tower"):
        tiny_model().embed_proposals(images, mask_logits)
    for options in ({"view": "singlepass"}, {"view": "lazy"}, {"fill": "none"}, {"fill": "zero"}):
        with pytest.raises(ValueError, match="must be"):
            model.embed_proposals(images, mask_logits, valid_sizes, **options)
    without_weight = tiny_model(vision=True, clip_ensemble_weight=None)
    with pytest.raises(ValueError, match="do not ensemble"):
        without_weight.ensemble(outputs, made, text, is_seen=is_seen)


# ------------------------------------------------------------------------------------------------ one pass for all


def test_one_pass_is_a_class_token_at_a_time_over_the_patches_under_its_mask(model):
    """Each proposal alone: CLIP's own pass keeps its patches; one more class token reads them, weighed by coverage."""
    tower, vision = model.vision_model, model.vision_model.vision_model
    image, masks = torch.rand(3, 32, 64), random_masks(6, 32, 64, seed=1)
    # geometric mean of the sides is twice CLIP's: scale 32 / sqrt(32 x 64), in patches of 8
    rows, columns = (round(side * 32 / (32 * 64) ** 0.5 / 8) for side in (32, 64))
    with torch.no_grad():
        together = region_vectors(tower, image, F.adaptive_avg_pool2d(masks.float(), (rows, columns)).flatten(1))
    pixels = (image - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    pixels = F.interpolate(
        pixels[None].float(), size=(8 * rows, 8 * columns), mode="bicubic", antialias=True, align_corners=False
    )
    with torch.no_grad():
        whole = vision(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        layers = whole.hidden_states
        for mask, embed in zip(masks, together, strict=True):
            covered = F.adaptive_avg_pool2d(mask[None, None].float(), (rows, columns)).flatten()
            token = layers[0][:, :1]
            for layer, hidden in zip(vision.encoder.layers, layers, strict=False):
                token = literal_layer(layer, token, hidden[:, 1:], covered)
            expected = tower.visual_projection(vision.post_layernorm(token))[0, 0]
            torch.testing.assert_close(embed, expected, atol=1e-5, rtol=1e-4)


def literal_layer(layer, token, patches, covered):
    """One token (1, 1, width) of a CLIP layer: it reads itself (weight 1) and patches (1, P, width), weight covered."""
    attention, heads = layer.self_attn, layer.self_attn.num_heads
    keys = torch.cat([token, patches], dim=1)
    normed = layer.layer_norm1(keys)
    query, key, value = (
        project(normed)[0].unflatten(-1, (heads, -1)).transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (heads, 1 + P, d)
    strength = (query[:, :1] @ key.mT / query.shape[-1] ** 0.5).exp() * torch.cat([torch.ones(1), covered])
    read = (strength / strength.sum(-1, keepdim=True)) @ value
    token = token + attention.out_proj(read.transpose(0, 1).flatten(1))[None]
    return token + layer.mlp(layer.layer_norm2(token))
