"""The families of encoders: texts and regions against transformers' own encoders and loops from the formulas."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from all_families import evaluations
from forked import ended, start_two
from tiny import byte_tokenizer, save_checkpoint, save_scenes_checkpoint, tiny_encoder, tiny_model, tiny_towers

from clip_views_zs3 import embed_proposals
from configuration_zs3 import Refused, Zs3Config
from encoders_zs3 import (
    FAMILIES,
    family_of,
    load_encoder,
    patch_grid,
    picture_vectors,
    region_vectors,
    square_windows,
    text_vectors,
)
from eval import evaluate
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import text_side
from zs3.data.image_labels import load_unseen_scores
from zs3.data.records import load_split
from zs3.label_space import load_label_space
from zs3.pseudo_labels import PseudoLabelArgs, make_pseudo_labels
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES as SCENES
from zs3.scenes.render import UNSEEN

every_family = pytest.mark.parametrize("family", FAMILIES)
NAMES = ["cat", "a very long name of some thing", "x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family's encoder with its tokenizer, as published."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny_encoder(family).save_pretrained(made[family])
        byte_tokenizer(family).save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def joined(folders):
    """A segmenter of each family's encoder, and the encoder itself."""
    sizes = tiny_model().config.to_dict()
    sizes = {name: sizes[name] for name in ("backbone_config", "hidden_dim", "feature_size", "mask_feature_size")}
    sizes |= {"num_attention_heads": 2, "decoder_layers": 2, "encoder_layers": 1, "num_queries": 4}
    make = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained
    return {family: (make(None, str(folder), **sizes), tiny_encoder(family)) for family, folder in folders.items()}


# ------------------------------------------------------------------------------------------------------------- texts


@every_family
def test_vectors_of_texts_are_those_of_transformers_alone_and_in_a_padded_batch(joined, family):
    model, encoder = joined[family]
    tokenizer = byte_tokenizer(family)
    batch = {
        name: tokenizer(NAMES, padding=True, return_tensors="pt")[name] for name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        together = text_vectors(model.text_model, **batch)
        for name, vector in zip(NAMES, together, strict=True):
            alone = encoder.get_text_features(**tokenizer([name], return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(vector, alone, atol=1e-5, rtol=1e-4)
        expected = F.normalize(encoder.get_text_features(**batch).pooler_output, dim=-1)
    torch.testing.assert_close(model.encode_text(**batch), expected, atol=1e-5, rtol=1e-4)


@every_family
def test_a_name_has_one_vector_whatever_list_it_is_in(joined, family):
    model, _ = joined[family]
    processor = Zs3Processor(Zs3ImageProcessor(), byte_tokenizer(family), FAMILIES[family].templates)
    together = model.encode_text(**processor(class_names=NAMES))
    alone = torch.cat([model.encode_text(**processor(class_names=[name])) for name in NAMES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_cache_tells_families_apart(monkeypatch):
    """The same weights and the same fields, read by another family."""
    tower, tokenizer = tiny_model().text_model, byte_tokenizer()
    before = text_side(tower, tokenizer)
    monkeypatch.setitem(FAMILIES, "clip", FAMILIES["clip"]._replace(title="another"))
    assert text_side(tower, tokenizer) != before


@every_family
def test_a_field_of_the_text_tower_that_changes_its_vectors_changes_the_caches_key(family):
    tower, tokenizer = tiny_model(family=family).text_model, byte_tokenizer(family)
    for field in FAMILIES[family].text_fields:
        before, value = text_side(tower, tokenizer), getattr(tower.config, field)
        tower.config.__dict__[field] = "another"
        assert text_side(tower, tokenizer) != before, field
        tower.config.__dict__[field] = value


# ---------------------------------------------------------------------------------------------- pictures and regions


@every_family
def test_vectors_of_pictures_are_those_of_transformers(joined, family):
    model, encoder = joined[family]
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = encoder.get_image_features(pixels).pooler_output
        torch.testing.assert_close(picture_vectors(model.vision_model, pixels), expected, atol=1e-5, rtol=1e-4)


def seen(family: str, image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(1, 3, h, w): the picture as the encoder takes it, in patches of 8 pixels."""
    mean, std = (torch.tensor(getattr(FAMILIES[family], name)).view(3, 1, 1) for name in ("mean", "std"))
    size = [8 * side for side in grid]
    return F.interpolate(((image - mean) / std)[None], size=size, mode="bicubic", antialias=True, align_corners=False)


def test_a_region_of_the_whole_picture_is_the_picture_to_clip(joined):
    model, encoder = joined["clip"]
    image = torch.rand(3, 24, 40)
    grid = patch_grid(model.vision_model, (24, 40))
    with torch.no_grad():
        (region,) = region_vectors(model.vision_model, image, torch.ones(1, grid[0] * grid[1]))
        whole = encoder.get_image_features(seen("clip", image, grid), interpolate_pos_encoding=True).pooler_output[0]
    torch.testing.assert_close(region, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patch_tokens", ["attention", "values"])
def test_regions_of_tipsv2_are_a_loop_over_patches(joined, patch_tokens):
    """In float64, the last block written out: without attention every token keeps its own value."""
    model, encoder = joined["tipsv2"]
    image, tower = torch.rand(3, 24, 40), copy.deepcopy(encoder).double().vision_model
    grid = patch_grid(model.vision_model, (24, 40))
    covered = torch.rand(3, grid[0] * grid[1])
    with torch.no_grad():
        found = region_vectors(model.vision_model, image, covered, patch_tokens)
        pixels = seen("tipsv2", image.double(), grid)
        block = tower.encoder.layer[0]
        before = tower.embeddings(pixels)
        normed = block.norm1(before)
        if patch_tokens == "values":
            read = block.attention.v_proj(normed)
        else:
            query, key, value = (
                project(normed)[0].unflatten(-1, (2, 8)).transpose(0, 1)
                for project in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
            )
            read = ((query @ key.mT / 8**0.5).softmax(-1) @ value).transpose(0, 1).flatten(1)[None]
        after = before + block.layer_scale1.lambda1 * block.attention.o_proj(read)
        after = after + block.layer_scale2.lambda1 * block.mlp(block.norm2(after))
        patches = tower.layernorm(after)[0, 2:]  # behind the class token and one register
        for region, shares in zip(found, covered.double(), strict=True):
            total = sum(share * patch / patch.norm() for share, patch in zip(shares, patches, strict=True))
            torch.testing.assert_close(region.double(), total / shares.sum(), atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("size", [(16, 16), (10, 60), (48, 20)])
def test_the_grid_keeps_the_shape_of_the_picture_at_the_familys_size(joined, family, size):
    rows, columns = patch_grid(joined[family][0].vision_model, size)
    side = FAMILIES[family].sides * 16
    assert abs(8 * rows - side * (size[0] / size[1]) ** 0.5) <= 4
    assert abs(8 * columns - side * (size[1] / size[0]) ** 0.5) <= 4


@every_family
def test_proposals_are_seen_as_their_family_sees_regions(family):
    """Soft masks count as M, others as M > threshold; on average over each patch."""
    model = tiny_model(vision=True, family=family)
    image, logits = torch.rand(1, 3, 32, 32), 3 * torch.randn(1, 4, 8, 8)
    found = model.embed_proposals(image, logits, view="single_pass", mask_threshold=0.4)
    masks = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)[0].sigmoid()
    masks = masks if FAMILIES[family].soft else (masks > 0.4).float()
    rows, columns = patch_grid(model.vision_model, (32, 32))
    covered = masks.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean(dim=(2, 4)).flatten(1)
    with torch.no_grad():
        expected = F.normalize(region_vectors(model.vision_model, image[0], covered), dim=-1)
    torch.testing.assert_close(found.embeds[0][found.shown[0]], expected[found.shown[0]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (80, 65), (48, 64), (64, 48), (97, 31), (30, 211)])
def test_windows_are_squares_that_cover_the_picture_and_overlap(size):
    windows = square_windows(size)
    pixels = np.zeros(size, dtype=int)
    for rows, columns in windows:
        pixels[rows, columns] += 1
    assert pixels.min() >= 1
    short, long = min(size), max(size)
    if long <= 1.25 * short:
        assert len(windows) == 1 and (pixels == 1).all()
        return
    assert all(r.stop - r.start == c.stop - c.start == short for r, c in windows)
    starts = sorted(max(rows.start, columns.start) for rows, columns in windows)
    steps = np.diff(starts)
    assert steps.max() <= 0.75 * short + 1 and steps.max() - steps.min() <= 1
    assert (len(windows) - 2) * 0.75 * short < long - short  # one window less would not do


@every_family
@pytest.mark.parametrize("turned", [False, True])
def test_a_wide_picture_is_the_mean_of_its_windows(family, turned):
    """Unit vectors of `region_vectors`, weighted by the area of the proposal in each window; loops."""
    model = tiny_model(vision=True, family=family)
    image, logits = torch.rand(1, 3, 32, 80), 3 * torch.randn(1, 4, 8, 20)
    logits[0, 1, :, 8:] = -30  # in the first window alone
    if turned:
        image, logits = image.mT, logits.mT
    found = model.embed_proposals(image, logits, view="single_pass", mask_threshold=0.4)
    masks = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[0].sigmoid()
    masks = masks if FAMILIES[family].soft else (masks > 0.4).float()
    expected = torch.zeros(4, model.config.projection_dim)
    for start in (0, 24, 48):
        window = [slice(0, 32), slice(start, start + 32)]
        rows, columns = reversed(window) if turned else window
        grid = patch_grid(model.vision_model, (32, 32))
        for query in range(4):
            own = masks[query, rows, columns]
            if own.sum() == 0:
                continue
            covered = F.adaptive_avg_pool2d(own[None], grid).flatten(1)
            with torch.no_grad():
                (vector,) = region_vectors(model.vision_model, image[0][:, rows, columns], covered)
            expected[query] += own.mean() * vector / vector.norm()
    expected = F.normalize(expected, dim=-1)
    assert found.shown.all()
    torch.testing.assert_close(found.embeds[0], expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- checkpoints


@every_family
def test_a_checkpoint_is_saved_and_loaded_with_its_family(tmp_path, family):
    saved = save_checkpoint(tmp_path, vision=True, family=family)
    loaded = Zs3ForSemanticSegmentation.from_pretrained(tmp_path).eval()
    for name in ("text_model", "vision_model"):
        tower, its = getattr(loaded, name), getattr(saved, name)
        assert type(tower) is type(its) and family_of(tower.config) is FAMILIES[family]
        assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), its.parameters(), strict=True))
    processor = Zs3Processor.from_pretrained(tmp_path)
    assert type(processor.tokenizer) is FAMILIES[family].tokenizer
    torch.testing.assert_close(
        loaded.encode_text(**processor(class_names=NAMES)), saved.encode_text(**processor(class_names=NAMES))
    )


def test_towers_without_a_model_type_are_those_of_clip():
    """As in files of older versions."""
    towers = {name: config.to_dict() for name, config in tiny_towers("clip").items()}
    for config in towers.values():
        del config["model_type"]
    config = Zs3Config(**towers, projection_dim=12)
    assert family_of(config.text_config) is family_of(config.vision_config) is FAMILIES["clip"]


def test_another_encoder_is_refused_in_words(tmp_path):
    with pytest.raises(Refused, match="text_config is of 'word2vec', which this version of transformers does not know"):
        Zs3Config(text_config={"model_type": "word2vec"})
    with pytest.raises(Refused, match="an encoder must be a CLIP or TIPSv2, got a resnet"):
        Zs3ForSemanticSegmentation(Zs3Config(text_config={"model_type": "resnet"}))
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(Refused, match="got a resnet"):
        Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(None, str(tmp_path))


def test_towers_of_two_encoders_are_refused():
    mixed = {"text_config": tiny_towers("clip")["text_config"].to_dict()}
    mixed |= {"vision_config": tiny_towers("tipsv2")["vision_config"].to_dict()}
    for fields, words in (
        (mixed | {"projection_dim": 12}, "makes vectors of 16 numbers, projection_dim is 12"),
        ({"vision_config": mixed["text_config"], "projection_dim": 12}, "vision_config is a clip_text_model"),
    ):
        with pytest.raises(Refused, match=words):
            Zs3ForSemanticSegmentation(Zs3Config(**fields))
    mixed["vision_config"]["hidden_size"] = 12
    with pytest.raises(Refused, match="the text tower is a CLIP's, the image tower a TIPSv2's"):
        Zs3ForSemanticSegmentation(Zs3Config(**mixed, projection_dim=12))


def test_the_tokenizer_of_a_checkpoint_is_one_of_the_known_classes(tmp_path):
    save_checkpoint(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "EvilTokenizer"}))
    assert type(Zs3Processor.from_pretrained(tmp_path).tokenizer) is FAMILIES["clip"].tokenizer


# ---------------------------------------------------------------------------------------------------- pseudo labels


@every_family
@pytest.mark.parametrize("region_view", ["crops", "single_pass"])
def test_pseudo_labels_of_another_encoder_are_those_of_a_loop(folders, tmp_path, family, region_view):
    """Eq. 9 and 10 by hand, with transformers' own text vectors; the checkpoint itself has no image tower."""
    write_dataset(tmp_path / "data", num_train=2, num_validation=1, seed=0)
    model = save_checkpoint(tmp_path / "stage1", seen_class_names=[name for name in SCENES if name not in UNSEEN])
    made = {"model": str(tmp_path / "stage1"), "dataset": str(tmp_path / "data"), "output": str(tmp_path / "out")}
    options = {"unannotated_share": 0.0, "fill": "mean", "region_view": region_view, "measure": False}
    make_pseudo_labels(PseudoLabelArgs(**made, encoder=str(folders[family]), **options))
    space = load_label_space(str(tmp_path / "data"))
    found = load_unseen_scores(tmp_path / "out", space, ["00000", "00001"])

    encoder, tokenizer = tiny_encoder(family), byte_tokenizer(family)
    vectors = []
    for name in space.unseen:
        prompts = [template.format(name) for template in FAMILIES[family].templates]
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            ids = {key: tokens[key] for key in ("input_ids", "attention_mask")}
            unit = F.normalize(encoder.get_text_features(**ids).pooler_output, dim=-1)
        vectors.append(F.normalize(unit.mean(0), dim=0))
    scale = float(encoder.logit_scale.exp() if family == "clip" else 1 / encoder.temperature)
    processor = Zs3ImageProcessor.from_pretrained(tmp_path / "stage1")
    tower = load_encoder(str(folders[family])).vision_model
    for index, row in enumerate(found):
        inputs = processor(load_split(tmp_path / "data", "train")[index].image)
        with torch.no_grad():
            proposals = model.propose(**inputs)
        images = processor.to_rgb(inputs["pixel_values"])
        options = {"view": region_view, "patch_tokens": "values"}  # TIPSv2's as published
        seen = embed_proposals(tower, images, proposals["mask_logits"], proposals["valid_sizes"], **options)
        scores = (scale * seen.embeds[0][seen.shown[0]] @ torch.stack(vectors).T).softmax(-1).amax(0)
        torch.testing.assert_close(torch.tensor(row), scores, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ two processes


def test_two_processes_give_the_results_of_one(folders, tmp_path):
    """One group of processes for all families: names without training, and the ensemble with another encoder."""
    write_dataset(tmp_path / "scenes", num_train=1, num_validation=5, seed=0)
    made = tmp_path / "made"
    save_scenes_checkpoint(made / "learned")
    for family, encoder in folders.items():
        options = {"vision": True, "class_head": "regions", "clip_ensemble_weight": None}
        save_scenes_checkpoint(made / family / "joined", family=family, **options)
        shutil.copytree(encoder, made / family / "encoder")
    expected = {args.output: evaluate(args) for args in evaluations(made, tmp_path / "scenes")}
    for output in expected:
        Path(output).unlink()
    two, log = start_two("all_families", [made, tmp_path / "scenes"], tmp_path / "log"), tmp_path / "log"
    assert [ended(process) for process in two] == [0, 0], log.read_text()[-3000:]
    assert len(expected) == 2 * len(FAMILIES)
    for output, result in expected.items():
        two = json.loads(Path(output).read_text())
        assert two["per_class"] == pytest.approx(result["per_class"], abs=1e-3), output
        assert len({pair["predicted"] for pair in two["worst_pairs"]}) > 1, output
