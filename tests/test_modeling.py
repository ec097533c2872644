"""The model against transformers' own Mask2Former and CLIP, and label maps against Eq. 4 written out."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CLASS_NAMES, byte_tokenizer, save_checkpoint, tiny_config, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import modeling_zs3
import outputs_zs3
from losses_zs3 import default_image_labels
from modeling_zs3 import (
    Zs3ForSemanticSegmentation,
    class_projection,
    draw_as_mask2former,
    ensemble_with_clip,
)
from outputs_zs3 import Zs3Output, label_similarity, tie
from processing_zs3 import Zs3ImageProcessor, Zs3Processor


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def with_row(value: float) -> Tensor:
    """Two text vectors, the second one full of a value."""
    return torch.stack([torch.ones(12), torch.full((12,), value)])


WRONG_VECTORS = {
    "zeros": (with_row(0), "1 of 2 text vectors have no direction, row 1 first"),
    "NaN": (with_row(torch.nan), "no direction, row 1 first"),
    "infinite": (with_row(torch.inf), "no direction"),
    "too large to have a length": (with_row(1e30), "no direction"),
    "too small to have a length": (with_row(1e-30), "no direction"),
    "whole numbers": (with_row(1).long(), "floating-point numbers, got torch.int64"),
    "bool": (with_row(1).bool(), "floating-point"),
    "complex": (with_row(1).to(torch.complex64), "floating-point"),
    "an array": (with_row(1).numpy(), "floating-point numbers, got ndarray"),
    "another size": (torch.ones(2, 11), r"\(C, 12\), got \(2, 11\)"),
    "one vector": (torch.ones(12), r"\(C, 12\), got \(12,\)"),
    "none": (torch.ones(0, 12), r"\(C, 12\), got \(0, 12\)"),
}


@pytest.mark.parametrize("wrong", WRONG_VECTORS)
def test_text_vectors_without_a_direction_or_of_a_wrong_type_are_refused(wrong):
    vectors, message = WRONG_VECTORS[wrong]
    with pytest.raises(ValueError, match=message) as refused:
        tiny_model(text=False)(torch.zeros(1, 3, 64, 32), text_embeds=vectors)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 200


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_text_vectors_may_be_floating_point_numbers_of_any_precision(kind):
    outputs = tiny_model(text=False)(torch.zeros(1, 3, 64, 32), text_embeds=unit(2, 12).to(kind))
    assert outputs.class_logits.isfinite().all()


def test_a_stored_vocabulary_that_is_damaged_is_refused_where_it_is_used():
    model = tiny_model(text=False)
    model.set_vocabulary(["cat", "dog"], unit(2, 12))
    model.vocabulary[1, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 2 text vectors have no direction, row 1 first"):
        model(torch.zeros(1, 3, 64, 32))


@pytest.mark.parametrize(
    "part",
    [
        "model.pixel_level_module.encoder.embedder.embedder.convolution.weight",
        "model.pixel_level_module.decoder.mask_projection.weight",
        "model.transformer_module.queries_features.weight",
        "class_projection.2.bias",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_an_error(part, value):
    model = tiny_model(text=False)
    with torch.no_grad():
        model.get_parameter(part).view(-1)[0] = value
    with pytest.raises(ValueError, match="(mask_logits|class_embeds) hold NaN or infinities"):
        model(torch.randn(1, 3, 64, 32), text_embeds=unit(3, 12))


def test_pixels_that_are_not_finite_are_an_error():
    pixels = torch.zeros(1, 3, 64, 32)
    pixels[0, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="pixel_values"):
        tiny_model(text=False)(pixels, text_embeds=unit(3, 12))


def test_an_image_tower_that_is_not_finite_is_an_error():
    model = tiny_model(text=False, vision=True)
    with torch.no_grad():
        model.vision_model.visual_projection.weight[0, 0] = torch.nan
    masks = torch.ones(1, 5, 16, 16)
    for view in ("crops", "single_pass"):
        with pytest.raises(ValueError, match="the image tower's embeddings of the proposals hold NaN"):
            model.embed_proposals(torch.rand(1, 3, 64, 64), masks, view=view)


# ------------------------------------------------------------------------------------------------- equal vectors


@pytest.fixture
def uneven(monkeypatch) -> None:
    """A machine whose products and powers are rounded otherwise in each column, as those of some are."""
    product, power = outputs_zs3.cosine_similarity, modeling_zs3.ensemble_with_clip

    def rounded(values: Tensor) -> Tensor:
        return values * (1 + 1e-7 * torch.arange(values.shape[-1]))

    monkeypatch.setattr(outputs_zs3, "cosine_similarity", lambda *args: rounded(product(*args)))
    monkeypatch.setattr(modeling_zs3, "ensemble_with_clip", lambda *args: rounded(power(*args)))


@pytest.mark.parametrize("classes", [2, 7, 33])
def test_equal_text_vectors_get_equal_logits_to_the_last_bit(uneven, classes):
    vectors = unit(1, 12).expand(classes, 12).clone()
    embeds = torch.randn(2, 5, 12)
    product = outputs_zs3.cosine_similarity(embeds, vectors)
    assert not torch.equal(product[..., 0], product[..., 1])
    logits = label_similarity(embeds, vectors)
    assert torch.equal(logits, logits[..., :1].expand_as(logits))
    torch.testing.assert_close(logits, product, rtol=1e-5, atol=1e-6)


def test_equal_vectors_do_not_tie_where_one_is_seen_and_one_is_not():
    model = tiny_model(seed=1, text=False, vision=True)
    vectors, pixels = unit(1, 12).expand(2, 12), torch.randn(1, 3, 64, 96)
    outputs, seen = model(pixels, text_embeds=vectors), torch.tensor([True, False])
    proposals = model.embed_proposals(torch.rand(1, 3, 64, 96), outputs.mask_logits)
    probs = model.ensemble(outputs, proposals, vectors, is_seen=seen, weight=0.7).class_probs
    assert torch.equal(outputs.class_logits[..., 0], outputs.class_logits[..., 1])
    whole = ensemble_with_clip(torch.full((1, 5, 2), 0.5), torch.full((1, 5, 2), 0.5), seen, 0.7)
    torch.testing.assert_close(probs, whole)


def test_a_list_of_one_or_no_vector_needs_no_tie():
    for classes in (0, 1):
        assert label_similarity(torch.randn(1, 4, 12), torch.randn(classes, 12)).shape == (1, 4, classes)


def test_columns_are_tied_to_the_first_equal_one_and_others_left_alone():
    torch.manual_seed(3)
    for classes in (1, 2, 6, 40):
        for _ in range(20):
            source = torch.randint(0, 3, (5, classes)).float()
            values = torch.randn(2, 3, classes)
            expected = values.clone()
            for column in range(classes):
                first = next(other for other in range(classes) if torch.equal(source[:, other], source[:, column]))
                expected[..., column] = values[..., first]
            assert torch.equal(tie(values, source), expected)


@pytest.mark.parametrize("owner", [None, torch.arange(17)], ids=["one word", "a synonym of its own"])
@pytest.mark.parametrize("ensemble", ["off", "crops", "single_pass"])
def test_of_equal_vectors_the_lowest_index_wins_in_the_label_map(uneven, ensemble, owner):
    model = tiny_model(seed=1, text=False, vision=True)
    vectors = unit(3, 12).repeat(6, 1)[:17]
    pixels = torch.randn(1, 3, 64, 96)
    outputs = model(pixels, text_embeds=vectors)
    if ensemble != "off":
        proposals = model.embed_proposals(torch.rand(1, 3, 64, 96), outputs.mask_logits, view=ensemble)
        is_seen = torch.arange(17) % 3 == 0
        outputs = model.ensemble(outputs, proposals, vectors, owner=owner, is_seen=is_seen, weight=0.7)
    probs = outputs.class_probs
    assert all(torch.equal(probs[..., column], probs[..., column % 3]) for column in range(17))
    label_map = modeling_zs3.semantic_map(probs, outputs.mask_logits, (64, 96))
    assert label_map.max() < 3


def plain_mask2former() -> Mask2FormerForUniversalSegmentation:
    """transformers' own, of tiny_config's sizes."""
    ours = tiny_config(text=False)
    names = set(Mask2FormerConfig.__dataclass_fields__) & set(ours.to_dict())
    fields = {name: value for name, value in ours.to_dict().items() if name in names}
    config = Mask2FormerConfig(**{**fields, "backbone_config": ours.backbone_config})
    return Mask2FormerForUniversalSegmentation(config).eval()


# ------------------------------------------------------------------------------------------ loading and saving


def test_a_plain_mask2former_checkpoint_loads_and_draws_the_same_masks(tmp_path):
    plain = plain_mask2former()
    plain.save_pretrained(tmp_path)
    model, info = Zs3ForSemanticSegmentation.from_pretrained(
        tmp_path, config=tiny_config(text=False), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {f"class_projection.{n}.{kind}" for n in "02" for kind in ("weight", "bias")}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]  # only the class head is left behind, knowingly
    assert set(model.model.state_dict()) == set(plain.model.state_dict())
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = plain(pixels).masks_queries_logits
        logits = model(pixels, text_embeds=unit(3, 12)).mask_logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_saving_and_loading_changes_nothing(tmp_path):
    model = save_checkpoint(tmp_path, vision=True)
    again = Zs3ForSemanticSegmentation.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)()) for one in (model, again))
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert any("position_ids" in name for name, _ in model.named_buffers())  # not persistent: CLIP's
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    pixels = torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        expected, outputs = model(pixels), again(pixels)
    torch.testing.assert_close(outputs.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.class_logits, expected.class_logits, rtol=1e-4, atol=1e-3)


def test_a_loaded_model_is_evaluating_and_in_the_saved_precision(tmp_path):
    save_checkpoint(tmp_path)
    model = Zs3ForSemanticSegmentation.from_pretrained(tmp_path)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_baseline_and_paper_load_each_others_checkpoints(tmp_path):
    baseline = tiny_model(text=False, class_loss="cross_entropy")
    assert baseline.background_embed.shape == (12,) and baseline.background_embed.norm() > 0
    baseline.save_pretrained(tmp_path / "baseline")
    load = Zs3ForSemanticSegmentation.from_pretrained
    same = load(tmp_path / "baseline")
    assert torch.equal(same.background_embed, baseline.background_embed)

    paper, info = load(tmp_path / "baseline", config=tiny_config(text=False), output_loading_info=True)
    assert paper.background_embed is None and not info["missing_keys"] and not info["unexpected_keys"]
    paper.save_pretrained(tmp_path / "paper")
    config = tiny_config(text=False, class_loss="cross_entropy")
    back, info = load(tmp_path / "paper", config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == {"background_embed"} and not info["unexpected_keys"]
    assert 0.1 < back.background_embed.norm() < 10 and torch.isfinite(back.background_embed).all()
    for name, weight in baseline.state_dict().items():
        if name != "background_embed":
            assert torch.equal(weight, back.state_dict()[name]), name


def assert_drawn_by_pytorch(network: Mask2FormerModel) -> None:
    transformer = network.transformer_module
    embeddings = [transformer.queries_embedder, transformer.queries_features, transformer.level_embed]
    for weight in (*(embedding.weight for embedding in embeddings), network.pixel_level_module.decoder.level_embed):
        assert weight.std().item() == pytest.approx(nn.Embedding(*weight.shape).weight.std().item(), rel=0.2)
    layers = [layer for layer in transformer.decoder.mask_predictor.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        fresh = nn.Linear(layer.in_features, layer.out_features)
        for mine, its in zip(layer.parameters(), fresh.parameters(), strict=True):
            assert mine.std().item() == pytest.approx(its.std().item(), rel=0.2)
            assert mine.abs().max().item() == pytest.approx(its.abs().max().item(), rel=0.1)


WIDE = {"hidden_dim": 64, "mask_feature_size": 64, "feature_size": 64, "num_queries": 50}


def test_a_new_models_queries_levels_and_mask_mlp_are_drawn_by_pytorch():
    assert_drawn_by_pytorch(Zs3ForSemanticSegmentation(tiny_config(text=False, **WIDE)).model)


def test_with_an_older_transformers_they_are_drawn_again_and_nothing_else(monkeypatch):
    network = Zs3ForSemanticSegmentation(tiny_config(text=False, **WIDE)).model
    decoder, transformer = network.pixel_level_module.decoder, network.transformer_module
    drawn = [transformer.queries_embedder, transformer.queries_features, transformer.level_embed]
    drawn = [decoder.level_embed, *(module.weight for module in drawn)]
    drawn += transformer.decoder.mask_predictor.parameters()
    for weight in drawn:
        weight.data.fill_(0.02)  # about what older versions make of it
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    monkeypatch.setattr(modeling_zs3.transformers, "__version__", "5.23.0")
    draw_as_mask2former(network)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    monkeypatch.setattr(modeling_zs3.transformers, "__version__", "5.22.1")
    draw_as_mask2former(network)
    assert_drawn_by_pytorch(network)
    changed = [name for name, weight in network.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) == len(drawn)


def test_a_new_model_asks_for_the_drawing(monkeypatch):
    asked = []
    monkeypatch.setattr("modeling_zs3.draw_as_mask2former", asked.append)
    model = tiny_model(text=False)
    assert asked == [model.model]


def test_class_projections_are_the_mlp_of_the_contract_or_one_layer():
    shapes = [tuple(p.shape) for p in class_projection(6, 3, "mlp").parameters() if p.dim() == 2]
    assert shapes == [(24, 6), (3, 24)]
    assert [tuple(p.shape) for p in class_projection(6, 3, "linear").parameters()] == [(3, 6), (3,)]
    layers = class_projection(6, 3, "mlp")
    x = torch.randn(2, 6)
    hidden = (x @ layers[0].weight.T + layers[0].bias).clamp(min=0)
    torch.testing.assert_close(layers(x), hidden @ layers[2].weight.T + layers[2].bias)


# ---------------------------------------------------------------------------- from_mask2former_clip_pretrained


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny CLIP in a folder; its towers' sizes are those of tiny_config."""
    config = tiny_config(vision=True)
    torch.manual_seed(1)
    towers = {name: getattr(config, name).to_dict() for name in ("text_config", "vision_config")}
    towers["text_config"].pop("projection_dim")  # of the whole CLIP, as in published checkpoints
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(**towers, projection_dim=12)).save_pretrained(folder)
    return str(folder)


def test_joining_a_mask2former_and_a_clip_keeps_all_their_weights(tmp_path, clip):
    plain = plain_mask2former()
    plain.save_pretrained(tmp_path)
    model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(str(tmp_path), clip, rank_weight=0.5)
    assert model.config.rank_weight == 0.5 and model.config.projection_dim == 12 and model.config.num_queries == 5
    whole = CLIPModel.from_pretrained(clip)
    text = {f"text_model.{name}": value for name, value in whole.text_model.state_dict().items()}
    vision = {f"vision_model.{name}": value for name, value in whole.vision_model.state_dict().items()}
    pairs = (
        (model.model, plain.model.state_dict()),
        (model.text_model, {**text, "text_projection.weight": whole.text_projection.weight}),
        (model.vision_model, {**vision, "visual_projection.weight": whole.visual_projection.weight}),
    )
    for ours, theirs in pairs:
        ours = ours.state_dict()
        assert set(ours) == set(theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    ids = byte_tokenizer()(["sky", "red circle"], padding=True, return_tensors="pt")
    with torch.no_grad():
        features = whole.get_text_features(**ids)
    features = getattr(features, "pooler_output", features)
    torch.testing.assert_close(model.encode_text(**ids), F.normalize(features, dim=-1), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for tower in (model.text_model, model.vision_model) for p in tower.parameters())


def test_a_start_from_a_backbone_alone(tmp_path, clip):
    """The backbone folder is an image classifier's, as ImageNet checkpoints are."""
    config = ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8)
    classifier = ResNetForImageClassification(config)
    for buffer in classifier.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # running statistics that nothing else would hold
    classifier.save_pretrained(tmp_path)
    sizes = {name: getattr(tiny_config(), name) for name in ("hidden_dim", "feature_size", "num_queries")}
    model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(
        None, clip, backbone=str(tmp_path), vision_config=None, mask_feature_size=32, decoder_layers=2, **sizes
    )
    assert model.vision_model is None and model.text_model is not None
    ours = model.model.pixel_level_module.encoder.state_dict()
    theirs = classifier.resnet.state_dict()
    assert theirs and set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_start_without_any_checkpoint_is_random_and_without_towers():
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 2, "num_queries": 4}
    backbone = tiny_config().backbone_config
    model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(
        None, None, backbone_config=backbone, projection_dim=7, **sizes
    )
    assert model.text_model is None and model.vision_model is None and model.config.projection_dim == 7


def test_a_mask2former_and_a_backbone_are_one_too_many(clip):
    with pytest.raises(ValueError, match="not both"):
        Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained("a", clip, backbone="b")


# ------------------------------------------------------------------------------------------------------- text


def test_encode_text_is_transformers_clip_prompt_by_prompt():
    model, tokenizer = tiny_model(), byte_tokenizer()
    prompts = [["a photo of a dog.", "There is a dog in the scene", "puppy"], ["sky"]]  # the second has one
    clip = CLIPTextModelWithProjection(model.config.text_config).eval()
    clip.load_state_dict(model.text_model.state_dict())
    expected = []
    for words in prompts:
        with torch.no_grad():
            each = [clip(**tokenizer(word, return_tensors="pt")).text_embeds[0] for word in words]
        mean = sum(vector / vector.norm() for vector in each) / len(each)
        expected.append(mean / mean.norm())
    tokens = Zs3Processor(Zs3ImageProcessor(), tokenizer, ["{}"])(class_names=prompts)
    assert tokens["input_ids"].shape[:2] == (2, 3) and (tokens["attention_mask"][1, 1:] == 0).all()
    embeds = model.encode_text(**tokens)
    torch.testing.assert_close(embeds, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert (expected[0] - expected[1]).norm() > 0.05  # and they differ

    one = tokenizer([words[0] for words in prompts], padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = F.normalize(clip(**one).text_embeds, dim=-1)
    torch.testing.assert_close(model.encode_text(one["input_ids"], one["attention_mask"]), plain)
    torch.testing.assert_close(model.encode_text(one["input_ids"]), plain)  # what follows the end has no say


def test_more_prompts_than_one_chunk_make_no_difference(monkeypatch):
    model = tiny_model()
    ids = torch.randint(0, 500, (7, 3, 6))
    ids[..., -1] = 513
    whole = model.encode_text(ids)
    monkeypatch.setattr("text_zs3.PROMPTS_AT_ONCE", 4)
    torch.testing.assert_close(model.encode_text(ids), whole, rtol=1e-5, atol=1e-6)


def test_a_class_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        tiny_model().encode_text(torch.ones(2, 1, 3, dtype=torch.int64), torch.tensor([[[1, 1, 1]], [[0, 0, 0]]]))


def test_text_comes_from_exactly_one_source():
    model, pixels = tiny_model(text=False), torch.randn(1, 3, 64, 32)
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="not both"):
        model(pixels, text_embeds=unit(2, 12), input_ids=ids)
    with pytest.raises(ValueError, match="no text.*set_vocabulary"):
        model(pixels)
    with pytest.raises(ValueError, match="no text tower"):
        model(pixels, input_ids=ids)
    with pytest.raises(ValueError, match=r"\(C, 12\), got \(2, 13\)"):
        model(pixels, text_embeds=unit(2, 13))


def test_class_logits_are_cosines_over_temperature():
    model, text_embeds = tiny_model(text=False, class_temperature=0.2), torch.randn(3, 12)  # not unit length
    outputs = model(torch.randn(2, 3, 32, 32), text_embeds=text_embeds)
    for image in range(2):
        for query in range(5):
            for label in range(3):
                cosine = F.cosine_similarity(outputs.class_embeds[image, query], text_embeds[label], dim=0)
                torch.testing.assert_close(outputs.class_logits[image, query, label], cosine / 0.2)
    torch.testing.assert_close(outputs.class_probs.sum(-1), torch.ones(2, 5))


def test_the_background_embedding_takes_part_in_the_softmax_only():
    model, text_embeds = tiny_model(text=False, class_loss="cross_entropy", class_temperature=0.5), unit(3, 12)
    pixels = torch.randn(1, 3, 64, 32)
    outputs = model(pixels, text_embeds=text_embeds)
    with_background = model(pixels, text_embeds=torch.cat([text_embeds, model.background_embed[None]]).detach())
    exponentials = with_background.class_logits.exp()
    torch.testing.assert_close(outputs.class_probs, exponentials[..., :3] / exponentials.sum(-1, keepdim=True))


def test_a_stored_vocabulary_is_used_and_survives_saving(tmp_path):
    model, embeds, pixels = tiny_model(text=False), torch.randn(3, 12), torch.randn(1, 3, 64, 32)
    model.set_vocabulary(["cat", "dog", "road, route"], embeds)
    assert model.config.class_names == ["cat", "dog", "road, route"]
    expected = model(pixels, text_embeds=embeds).class_logits
    torch.testing.assert_close(model(pixels).class_logits, expected)
    model.set_vocabulary(["cat", "dog"], embeds[:2])  # another length
    model.save_pretrained(tmp_path)
    again = Zs3ForSemanticSegmentation.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    torch.testing.assert_close(again(pixels).class_logits, expected[..., :2], rtol=1e-4, atol=1e-3)


def test_a_wrong_vocabulary_is_refused_and_nothing_is_stored():
    model = tiny_model(text=False)
    with pytest.raises(ValueError, match="'cat' and 'Cat' are one name"):
        model.set_vocabulary(["cat", "dog", "Cat\u00a0"], torch.randn(3, 12))
    with pytest.raises(ValueError, match="a row for each of 2 names, got 3"):
        model.set_vocabulary(["cat", "dog"], torch.randn(3, 12))
    for vectors, message in WRONG_VECTORS.values():
        with pytest.raises(ValueError, match=message):
            model.set_vocabulary(["cat", "dog"], vectors)
    assert model.vocabulary is None and model.config.class_names is None


def test_a_vocabulary_from_names_alone_is_their_prompts_mean():
    model, tokenizer = tiny_model(), byte_tokenizer()
    processor = Zs3Processor(Zs3ImageProcessor(), tokenizer, ["{}"])
    labels = [["grass", "green lawn"], {"name": "car", "synonyms": ["auto"], "templates": ["one {}"]}, "sky"]
    model.set_vocabulary(labels, processor=processor)
    assert model.config.class_names == ["grass", "car", "sky"]
    assert model.config.id2label == {0: "grass", 1: "car", 2: "sky"} and model.config.label2id["car"] == 1
    for row, prompts in enumerate((["grass", "green lawn"], ["one car", "one auto"], ["sky"])):
        with torch.no_grad():
            each = [model.text_model(**tokenizer(words, return_tensors="pt")).text_embeds[0] for words in prompts]
        mean = sum(vector / vector.norm() for vector in each)
        torch.testing.assert_close(model.vocabulary[row], mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_names_that_nothing_can_embed_are_refused_and_nothing_is_stored(tmp_path):
    with pytest.raises(ValueError, match="no text tower.*pass text_embeds"):
        tiny_model(text=False).set_vocabulary(["cat"])
    model = tiny_model()
    with pytest.raises(ValueError, match="not loaded from a checkpoint.*pass processor="):
        model.set_vocabulary(["cat"])
    with pytest.raises(ValueError, match="not a Zs3ImageProcessor: pass processor="):
        model.set_vocabulary(["cat"], processor=Zs3ImageProcessor())
    assert model.vocabulary is None and model.config.class_names is None
    save_checkpoint(tmp_path)
    model = Zs3ForSemanticSegmentation.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded here: pass processor="):
        model.set_vocabulary(["cat"])


def test_names_are_embedded_by_the_processor_beside_the_checkpoint(tmp_path):
    save_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(settings | {"prompt_templates": ["one {}"]}))
    model, tokenizer = Zs3ForSemanticSegmentation.from_pretrained(tmp_path), byte_tokenizer()
    model.set_vocabulary(["cat", "dog"])
    with torch.no_grad():
        alone = [model.text_model(**tokenizer([f"one {name}"], return_tensors="pt")) for name in ("cat", "dog")]
    expected = torch.cat([text.text_embeds / text.text_embeds.norm() for text in alone])
    torch.testing.assert_close(model.vocabulary, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "100KB"}, {"state_dict": None}])
def test_a_checkpoint_without_its_text_tower_is_smaller_and_answers_the_same(tmp_path, how):
    save_checkpoint(tmp_path / "whole", vision=True)
    model = Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "whole")  # its keys are renamed on loading and saving
    before, pixels = {name: value.clone() for name, value in model.state_dict().items()}, torch.randn(1, 3, 64, 32)
    if "state_dict" in how:
        how = {"state_dict": model.state_dict()}
    model.save_pretrained(tmp_path / "less", drop_text_tower=True, **how)

    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("whole", "less")]
    tower = sum(parameter.nbytes for parameter in model.text_model.parameters())
    assert 0.9 * tower < sizes[0] - sizes[1] < 1.3 * tower
    assert len(list((tmp_path / "less").glob("*.safetensors"))) == (3 if "max_shard_size" in how else 1)
    less, info = Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert less.text_model is None and less.config.text_config is None and less.vision_model is not None
    with torch.no_grad():
        ours, theirs = model(pixels), less(pixels)
    torch.testing.assert_close(theirs.mask_logits, ours.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.class_logits, ours.class_logits, rtol=1e-4, atol=1e-3)

    assert model.config.text_config is not None  # the model in memory is what it was
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]


def test_a_text_tower_that_cannot_be_dropped_stays_where_it_was(tmp_path, monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match="call set_vocabulary first"):
        model.save_pretrained(tmp_path / "checkpoint", drop_text_tower=True)
    assert not (tmp_path / "checkpoint").exists()

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    model.set_vocabulary(["cat"], torch.randn(1, 12))
    before = model.config.to_dict()
    monkeypatch.setattr("modeling_zs3.Zs3PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "checkpoint", drop_text_tower=True)
    assert model.text_model is not None and model.config.to_dict() == before


# ------------------------------------------------------------------------------------------------ image labels


def test_default_image_labels():
    ids = [torch.tensor([0, 3]), torch.tensor([], dtype=torch.int64)]
    is_seen = torch.tensor([True, True, False, False, True])
    image_labels = default_image_labels(ids, 5, is_seen)
    assert image_labels.dtype == torch.int8
    assert image_labels.tolist() == [[1, 0, -1, 1, 0], [0, 0, -1, -1, 0]]  # present, absent seen, absent unseen
    assert default_image_labels(ids, 5, None).tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_forward_uses_the_default_image_labels():
    model, is_seen = tiny_model(text=False), torch.tensor([True, True, True, False])
    labels = torch.zeros(1, 64, 32, dtype=torch.int64)
    labels[:, :16], labels[:, :4] = 2, -1
    batch = {"pixel_values": torch.randn(1, 3, 64, 32), "text_embeds": unit(4, 12), "labels": labels}

    def terms(**extra) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return model(**batch, **extra).loss_terms

    default, given = terms(is_seen=is_seen), terms(image_labels=torch.tensor([[1, 0, 1, -1]]))
    assert all(torch.equal(default[name], given[name]) for name in given)
    assert terms()["rank"] > default["rank"]  # without is_seen the last name is a negative too
    assert torch.equal(terms()["rank"], terms(image_labels=torch.tensor([[1, 0, 1, 0]]))["rank"])


@pytest.mark.parametrize("matching", ["joint", "hybrid", "unpaired"])
def test_ids_that_name_no_class_are_refused_where_they_must(matching):
    model = tiny_model(text=False, matching=matching)
    batch = {"text_embeds": unit(4, 12), "labels": torch.full((1, 64, 32), 7)}
    mend = "pass image_labels" if matching == "unpaired" else f"with matching '{matching}' ids index the class axis"
    with pytest.raises(ValueError, match=f"id 7, but there are 4 classes: {mend}"):
        model(torch.randn(1, 3, 64, 32), **batch)
    batch["image_labels"] = torch.ones(1, 4, dtype=torch.int8)
    if matching == "unpaired":  # class-agnostic masks: any id will do
        assert torch.isfinite(model(torch.randn(1, 3, 64, 32), **batch).loss)
    else:
        with pytest.raises(ValueError, match=mend):
            model(torch.randn(1, 3, 64, 32), **batch)


def test_image_labels_of_another_shape_are_refused():
    model = tiny_model(text=False)
    with pytest.raises(ValueError, match=r"image_labels must be \(1, 4\), .* got \(1, 3\)"):
        model(
            torch.randn(1, 3, 64, 32),
            text_embeds=unit(4, 12),
            labels=torch.zeros(1, 64, 32, dtype=torch.int64),
            image_labels=torch.ones(1, 3, dtype=torch.int8),
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", torch.zeros(1, 64, 32)),
        ("labels", torch.full((1, 64, 32), float("nan"))),
        ("labels", torch.ones(1, 64, 32, dtype=torch.bool)),
        ("labels", torch.zeros(1, 64, 32, dtype=torch.complex128)),
        ("labels", torch.full((1, 64, 32), -2)),
        ("labels", torch.zeros(1, 32, 32, dtype=torch.int64)),
        ("labels", torch.zeros(2, 64, 32, dtype=torch.int64)),
        ("labels", torch.zeros(64, 32, dtype=torch.int64)),
        ("labels", np.zeros((1, 64, 32), dtype=np.int64)),
        ("image_labels", torch.tensor([[1, 0, 2, 0]])),
        ("image_labels", torch.tensor([[-2, 0, 1, 0]])),
        ("image_labels", torch.tensor([[1.0, 0.5, 0, 0]])),
        ("image_labels", torch.tensor([[1.0, float("nan"), 0, 0]])),
        ("image_labels", [[1, 0, 0, 0]]),
        ("is_seen", torch.tensor([True])),
    ],
)
def test_labels_that_are_none_are_refused_in_one_short_line(field, value):
    labels = torch.zeros(1, 64, 32, dtype=torch.int64)
    batch = {"text_embeds": unit(4, 12), "labels": labels, field: value}
    with pytest.raises(ValueError, match=f"^{field} must be ") as error:
        tiny_model(text=False)(torch.randn(1, 3, 64, 32), **batch)
    assert len(str(error.value)) <= 200 and "\n" not in str(error.value)


def test_whole_numbers_say_which_classes_are_seen_as_booleans_do():
    model, labels = tiny_model(text=False), torch.zeros(1, 64, 32, dtype=torch.int64)
    losses = []
    for is_seen in (torch.tensor([True, True, False]), torch.tensor([1, 1, 0])):
        torch.manual_seed(0)
        losses.append(model(torch.ones(1, 3, 64, 32), text_embeds=unit(3, 12), labels=labels, is_seen=is_seen).loss)
    assert losses[0] == losses[1]


def test_whatever_looks_at_shapes_alone_can_run_the_model():
    """As it can transformers' own: one graph, exported programs, tensors without values."""
    model, pixels = tiny_model(), torch.randn(2, 3, 64, 64)
    model.set_vocabulary(list("abcd"), unit(4, 12))
    with torch.no_grad():
        expected = model(pixels).class_logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values=pixels).class_logits, expected, rtol=1e-4, atol=1e-3)
        program = torch.export.export(model, (pixels,), strict=False).module()
        torch.testing.assert_close(program(pixels).class_logits, expected, rtol=1e-4, atol=1e-3)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.empty(2, 3, 64, 64)).class_logits.shape == expected.shape
        assert copy.deepcopy(model).to("meta")(pixels.to("meta")).class_logits.shape == expected.shape


def test_hooks_for_gradients_of_the_inputs_all_go_away():
    model = tiny_model()
    before = sum(len(module._forward_hooks) for module in model.modules())
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    model.disable_input_require_grads()
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


@pytest.mark.parametrize("matching", ["joint", "hybrid"])
def test_a_mask_of_a_class_that_is_said_to_be_absent_is_refused(matching):
    model, pixels = tiny_model(text=False, matching=matching), torch.randn(2, 3, 64, 32)
    labels = torch.stack([torch.zeros(64, 32, dtype=torch.int64), torch.full((64, 32), 2)])
    given = torch.tensor([[1, 0, 0, -1], [1, 0, 0, -1]])
    with pytest.raises(ValueError, match="class 2 has a mask in image 1, whose image_labels say it is absent"):
        model(pixels, text_embeds=unit(4, 12), labels=labels, image_labels=given)
    given[1, 2] = 1
    assert model(pixels, text_embeds=unit(4, 12), labels=labels, image_labels=given).loss.isfinite()


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_image_labels_may_be_of_any_kind_of_number(kind):
    model, labels = tiny_model(text=False), torch.zeros(1, 64, 32, dtype=torch.uint8)
    losses = []
    for given in (torch.tensor([[1, 0, 1, 0]], dtype=torch.int8), torch.tensor([[1, 0, 1, 0]]).to(kind)):
        torch.manual_seed(0)
        losses.append(model(torch.ones(1, 3, 64, 32), text_embeds=unit(4, 12), labels=labels, image_labels=given).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", float("nan")),
        ("weight", True),
        ("weight", "x" * 1000),
        ("mask_threshold", float("nan")),
        ("mask_threshold", True),
        ("view", "x" * 1000),
    ],
)
def test_options_of_the_ensemble_are_refused_in_one_short_line(name, value):
    model, pixels, text = tiny_model(text=False, vision=True), torch.rand(1, 3, 64, 64), unit(3, 12)
    outputs = model(pixels, text_embeds=text)
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        ensemble(model, outputs, pixels, text, **{name: value})
    assert len(str(error.value)) <= 200


def ensemble(model, outputs, images, text, weight=0.5, **views):
    is_seen = torch.tensor([True, True, False])
    return model.ensemble(
        outputs, model.embed_proposals(images, outputs.mask_logits, **views), text, is_seen=is_seen, weight=weight
    )


def test_numbers_of_numpy_are_numbers_for_the_ensemble():
    model, pixels, text = tiny_model(text=False, vision=True), torch.rand(1, 3, 64, 64), unit(3, 12)
    outputs = model(pixels, text_embeds=text)
    options = {"weight": 0.5, "mask_threshold": 0.25}
    of_numpy = {"weight": np.float32(0.5), "mask_threshold": np.float16(0.25)}
    found = [ensemble(model, outputs, pixels, text, **given) for given in (options, of_numpy)]
    assert torch.equal(found[0].ensemble_probs, found[1].ensemble_probs)


# ------------------------------------------------------------------------------------------- sizes and padding


def test_an_image_gives_the_same_answer_alone_and_in_any_batch():
    model, sizes = tiny_model(text=False), [(50, 70), (96, 64), (41, 40), (50, 70), (33, 100)]
    text_embeds, processor = unit(4, 12), Zs3ImageProcessor()
    images = [torch.randn(3, *size) for size in sizes]
    pixels, mask = torch.zeros(5, 3, 96, 128), torch.zeros(5, 96, 128, dtype=torch.int64)
    for row, (height, width) in enumerate(sizes):
        pixels[row, :, :height, :width], mask[row, :height, :width] = images[row], 1
    originals = [(100, 140), (96, 64), (20, 31), (50, 70), (66, 200)]
    with torch.no_grad():
        batch = model(pixels, pixel_mask=mask, text_embeds=text_embeds)
        alone = [model(image[None], text_embeds=text_embeds) for image in images]
    assert batch.valid_sizes.tolist() == [list(size) for size in sizes]
    maps = processor.post_process_semantic_segmentation(batch, originals)
    assert max(len(torch.unique(label_map)) for label_map in maps) > 1
    for row, single in enumerate(alone):
        height, width = single.mask_logits.shape[2:]
        assert (4 * height, 4 * width) == tuple(-(-side // 32) * 32 for side in sizes[row])
        ours = batch.mask_logits[row, :, :height, :width]
        torch.testing.assert_close(ours, single.mask_logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(enlarged(batch, row), enlarged(single, 0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.class_embeds[row], single.class_embeds[0], rtol=1e-4, atol=1e-4)
        (label_map,) = processor.post_process_semantic_segmentation(single, [originals[row]])
        assert label_map.shape == originals[row]
        assert (maps[row] == label_map).float().mean() > 0.9995  # all, but for ties within rounding
    own = processor.post_process_semantic_segmentation(batch)
    assert [tuple(label_map.shape) for label_map in own] == sizes


def enlarged(outputs: Zs3Output, row: int) -> Tensor:
    """Mask logits (Q, H, W) of one image at its own size, as on the way to its label map."""
    height, width = outputs.valid_sizes[row].tolist()
    logits = F.interpolate(outputs.mask_logits[row : row + 1], scale_factor=4, mode="bilinear", align_corners=False)
    return logits[0, :, :height, :width]


def test_an_image_of_any_size_is_padded_by_zeros_to_32():
    model, image = tiny_model(text=False), torch.randn(1, 3, 50, 70)
    padded = torch.zeros(1, 3, 64, 96)
    padded[:, :, :50, :70] = image
    with torch.no_grad():
        outputs = model(image, text_embeds=unit(2, 12))
        expected = model.model(padded).masks_queries_logits[-1]
    torch.testing.assert_close(outputs.mask_logits, expected, rtol=1e-4, atol=1e-4)
    assert outputs.valid_sizes.tolist() == [[50, 70]]


def test_a_saved_checkpoint_knows_its_names(tmp_path):
    model = save_checkpoint(tmp_path)
    assert model.config.id2label == dict(enumerate(CLASS_NAMES))
    assert Zs3ForSemanticSegmentation.from_pretrained(tmp_path).vocabulary.shape == (len(CLASS_NAMES), 12)


# ---------------------------------------------------------------------- what any transformers model is asked for

STATES = {
    "encoder_last_hidden_state",
    "pixel_decoder_last_hidden_state",
    "transformer_decoder_last_hidden_state",
    "encoder_hidden_states",
    "pixel_decoder_hidden_states",
    "transformer_decoder_hidden_states",
    "attentions",
}


def asked(labels: bool = False, **fields) -> dict[str, Tensor]:
    if labels:
        fields["labels"] = torch.arange(96).expand(2, 64, 96) // 24
    return {"pixel_values": torch.randn(2, 3, 64, 96), "text_embeds": unit(4, 12), **fields}


def assert_equal_states(found, expected, names) -> None:
    for name in names:
        values = [values if isinstance(values, tuple) else (values,) for values in (found[name], expected[name])]
        for mine, its in zip(*values, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("from_config", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_hidden_states_and_attentions_are_mask2formers(labels, from_config):
    plain, batch = plain_mask2former(), asked(labels)
    model = Zs3ForSemanticSegmentation(tiny_config(text=False)).eval()
    model.model.load_state_dict(plain.model.state_dict())
    flags = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = plain(batch["pixel_values"], **flags)
        if from_config:
            model.config.update(flags)
            found = model(**batch)
        else:
            found = model(**batch, **flags)
        without = model(**batch, output_hidden_states=False, output_attentions=False)
    assert_equal_states(found, expected, STATES)
    assert [len(found[name]) for name in sorted(STATES) if isinstance(found[name], tuple)] == [2, 4, 3, 3]
    torch.testing.assert_close(found.mask_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert set(without) == set(found) - STATES  # and nothing of them where nobody asks
    torch.testing.assert_close(without.class_embeds, found.class_embeds, rtol=1e-4, atol=1e-4)


def test_one_can_ask_for_hidden_states_or_for_attentions_alone():
    model, batch = tiny_model(text=False), asked()
    states, attentions = model(**batch, output_hidden_states=True), model(**batch, output_attentions=True)
    assert STATES - set(states) == {"attentions"}
    assert {name for name in STATES & set(attentions) if isinstance(attentions[name], tuple)} == {"attentions"}


@pytest.mark.parametrize("labels", [False, True])
def test_hidden_states_and_attentions_keep_their_gradients(labels):
    model, batch = tiny_model(text=False).train(), asked(labels)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = [value for name in STATES if isinstance(outputs[name], tuple) for value in outputs[name][:-1]]
    for value in kept:
        value.retain_grad()
    (outputs.loss if labels else outputs.mask_logits.sum()).backward()
    assert kept and all(value.grad.abs().sum() > 0 for value in kept)


def test_images_of_different_sizes_have_no_common_hidden_states():
    model, batch, mask = tiny_model(text=False), asked(), torch.ones(2, 64, 96, dtype=torch.int64)
    mask[:, 50:] = 0
    assert model(**batch, pixel_mask=mask, output_hidden_states=True).encoder_hidden_states[0].shape[0] == 2
    mask[1, 32:] = 0
    for flag in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="images of one size, got 2 sizes") as refused:
            model(**batch, pixel_mask=mask, **{flag: True})
        assert len(str(refused.value)) <= 200


@pytest.mark.parametrize("fields", [{}, {"output_hidden_states": True, "output_attentions": True}])
@pytest.mark.parametrize("labels", [False, True])
def test_without_return_dict_the_output_is_the_tuple_of_the_dict(labels, fields):
    model, batch = tiny_model(text=False), asked(labels, **fields)
    outputs = []
    for return_dict, in_config in ((True, False), (False, True), (None, False)):
        torch.manual_seed(2)  # of the loss's points
        model.config.return_dict = in_config
        outputs.append(model(**batch, return_dict=return_dict))
    expected = [value for value in outputs[0].values() if value is not None]
    for found in outputs[1:]:
        assert type(found) is tuple
        torch.testing.assert_close(list(found), expected, rtol=0, atol=0)
    assert labels == (outputs[1][0].dim() == 0)  # the loss is the first value


def test_the_input_embeddings_are_the_text_towers():
    model = tiny_model()
    embeddings = model.get_input_embeddings()
    assert embeddings is model.text_model.get_input_embeddings() and embeddings.weight.shape == (514, 16)
    model.resize_token_embeddings(520)
    assert model.get_input_embeddings().weight.shape == (520, 16) and model.config.text_config.vocab_size == 520
    assert torch.equal(model.get_input_embeddings().weight[:514], embeddings.weight[:514])
    model.encode_text(torch.tensor([[1, 519, 513]]))
    other = nn.Embedding(3, 16)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other is model.text_model.get_input_embeddings()


def test_without_a_text_tower_there_are_no_input_embeddings():
    model = tiny_model(text=False)
    for ask in (model.get_input_embeddings, lambda: model.set_input_embeddings(nn.Embedding(3, 16))):
        with pytest.raises(NotImplementedError, match="no text tower"):
            ask()
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()
    model.disable_input_require_grads()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_of_half_precision_answers_and_learns_as_that_of_float32(kind, hooked):
    model, batch = tiny_model(text=False), asked()
    with torch.no_grad():
        expected = model(**batch)
    model, batch["pixel_values"] = model.to(kind), batch["pixel_values"].to(kind)
    if hooked:
        model.model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        found = model(**batch)
    assert found.mask_logits.dtype == kind and found.class_logits.dtype == torch.float32
    error = (found.mask_logits.float() - expected.mask_logits).abs().mean()
    assert error < 0.1 * expected.mask_logits.abs().mean()  # 0.02 as a rule; a mask may block other pixels
    model.train()
    loss = model(**batch, labels=torch.arange(96).expand(2, 64, 96) // 24).loss
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_frozen_adapters_are_given_inputs_with_gradients():
    """Reentrant checkpointing gives no gradient to what is only given frozen inputs."""
    model, batch = tiny_model(text=False), asked(labels=True)
    model.requires_grad_(False).train()
    trained = [
        model.model.pixel_level_module.decoder.encoder.layers[0].fc1.weight,
        model.model.transformer_module.decoder.layers[0].fc1.weight,
    ]
    for weight in trained:
        weight.requires_grad_(True)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in trained)
    model.disable_input_require_grads()
    assert not model.model.pixel_level_module.encoder._forward_hooks
