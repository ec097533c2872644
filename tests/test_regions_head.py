"""A class head without training: what the image tower sees of each proposal, and the objectness of the proposals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import byte_tokenizer, save_checkpoint, tiny_config, tiny_mask2former, tiny_model
from transformers import Mask2FormerForUniversalSegmentation

from configuration_zs3 import Refused
from encoders_zs3 import FAMILIES
from modeling_zs3 import Zs3ForSemanticSegmentation
from pipeline_zs3 import Zs3Pipeline
from processing_zs3 import Zs3ImageProcessor, Zs3Processor

every_family = pytest.mark.parametrize("family", FAMILIES)
CLASSES = 3  # of the Mask2Former that is joined


@pytest.fixture(scope="module")
def proposer(tmp_path_factory):
    """A folder of transformers' own Mask2Former."""
    folder = tmp_path_factory.mktemp("mask2former")
    tiny_mask2former(CLASSES).save_pretrained(folder)
    return folder


def joined(proposer, **fields) -> Zs3ForSemanticSegmentation:
    config = tiny_config(vision=True)
    towers = {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}
    fields = {"class_head": "regions", "proposal_classes": CLASSES, "objectness": True, "projection_dim": 12} | fields
    return Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(str(proposer), None, **towers, **fields).eval()


def pictures() -> dict[str, torch.Tensor]:
    """Two pictures of different sizes, and their mask."""
    torch.manual_seed(3)
    mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    mask[0, :64, :96] = mask[1, :40, :64] = 1
    return {"pixel_values": torch.randn(2, 3, 64, 96) * mask[:, None], "pixel_mask": mask}


@every_family
@pytest.mark.parametrize("region_view", ["single_pass", "crops"])
def test_names_are_those_nearest_to_what_the_image_tower_sees(family, region_view):
    model = tiny_model(vision=True, family=family, class_head="regions", region_view=region_view, clip_logit_scale=50.0)
    text = F.normalize(torch.randn(3, model.config.projection_dim), dim=-1)
    batch = pictures()
    with torch.no_grad():
        outputs = model(**batch, text_embeds=text)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (batch["pixel_values"] * std + mean).clamp(0, 1)
    seen = model.embed_proposals(images, outputs.mask_logits, [(64, 96), (40, 64)], view=region_view)
    torch.testing.assert_close(outputs.region_embeds, seen.embeds)
    for image in range(2):
        for query in range(5):
            cosines = torch.stack([seen.embeds[image, query] @ name for name in text])
            torch.testing.assert_close(
                outputs.class_probs[image, query], (50 * cosines).softmax(0), atol=1e-5, rtol=1e-4
            )


def test_objectness_is_that_of_transformers_mask2former(proposer):
    model = joined(proposer)
    plain = Mask2FormerForUniversalSegmentation.from_pretrained(proposer).eval()
    pixels = torch.randn(2, 3, 64, 96)
    text = F.normalize(torch.randn(4, 12), dim=-1)
    with torch.no_grad():
        outputs, its = model(pixels, text_embeds=text), plain(pixels)
    expected = 1 - its.class_queries_logits.softmax(-1)[..., -1]
    assert expected.std() > 0.01
    torch.testing.assert_close(outputs.objectness, expected, atol=1e-4, rtol=1e-3)
    named = (100 * outputs.region_embeds @ text.T).softmax(-1)
    torch.testing.assert_close(outputs.class_probs, named * expected[..., None], atol=1e-4, rtol=1e-3)
    masks = F.interpolate(outputs.mask_logits, size=(64, 96), mode="bilinear", align_corners=False).sigmoid()
    dense = torch.einsum("bqc,bqhw->bchw", outputs.class_probs, masks)
    for found, scores in zip(Zs3ImageProcessor().post_process_semantic_segmentation(outputs), dense, strict=True):
        assert (found == scores.argmax(0)).float().mean() > 0.999  # but for ties


def test_a_picture_has_the_same_objectness_in_any_batch(proposer):
    model, batch = joined(proposer), pictures()
    with torch.no_grad():
        together = model.propose(**batch)["objectness"]
        small = {name: value[1:, ..., :40, :64] for name, value in batch.items()}
        alone = model.propose(**small)["objectness"]
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)


def test_without_objectness_it_is_not_computed(proposer):
    model = joined(proposer, objectness=False)
    assert "objectness" not in model.propose(torch.randn(1, 3, 64, 64))
    with pytest.raises(Refused, match="objectness needs the class predictor"):
        joined(proposer, proposal_classes=0)


@every_family
def test_the_pipeline_names_with_it(tmp_path, family):
    model = save_checkpoint(tmp_path, vision=True, family=family, class_head="regions", clip_ensemble_weight=None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    processor = Zs3Processor.from_pretrained(tmp_path)
    loaded = Zs3ForSemanticSegmentation.from_pretrained(tmp_path).eval()
    segment = Zs3Pipeline(model=loaded, processor=processor, image_processor=processor.image_processor)
    proposals = segment.propose(image)
    assert proposals.outputs[0]["region_embeds"].shape == (1, 5, model.config.projection_dim)
    for labels in (["sky", "grass"], ["a", "b", "c"]):
        result = segment(proposals, labels, output="map")
        inputs = processor(images=[image], class_names=labels)
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_semantic_segmentation(outputs, [(50, 70)])
        assert (result["segmentation"] == expected.numpy()).mean() > 0.999
        assert (segment(image, labels, output="map")["segmentation"] == result["segmentation"]).all()


# ---------------------------------------------------------------------------------------- a head without training


def test_a_head_that_was_never_trained_names_nothing(proposer, tmp_path):
    model = joined(proposer, class_head="learned", objectness=False)
    text = F.normalize(torch.randn(2, 12), dim=-1)
    with pytest.raises(Refused, match="the class head was never trained"):
        model(torch.randn(1, 3, 64, 64), text_embeds=text)
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="the class head was never trained"):
        Zs3ForSemanticSegmentation.from_pretrained(tmp_path).eval()(torch.randn(1, 3, 64, 64), text_embeds=text)
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64), text_embeds=text, labels=labels).loss)  # before any step
    model.train()
    model(torch.randn(1, 3, 64, 64), text_embeds=text, labels=labels).loss.backward()
    assert model.eval()(torch.randn(1, 3, 64, 64), text_embeds=text).class_logits.shape == (1, 5, 2)


def test_regions_learn_nothing_and_say_so(proposer):
    model = joined(proposer).train()
    text = F.normalize(torch.randn(2, 12), dim=-1)
    with pytest.raises(Refused, match="class_head 'regions' learns nothing: set config.class_head = 'learned'"):
        model(torch.randn(1, 3, 64, 64), text_embeds=text, labels=torch.zeros(1, 64, 64, dtype=torch.int64))
    assert not any(weight.requires_grad for weight in model.class_predictor.parameters())


def test_regions_need_an_image_tower():
    with pytest.raises(Refused, match="class_head 'regions' needs an image tower"):
        tiny_config(class_head="regions")


def test_the_tokenizer_of_the_family_is_used(tmp_path):
    save_checkpoint(tmp_path, vision=True, family="tipsv2")
    assert Zs3Processor.from_pretrained(tmp_path).tokenizer.get_vocab() == byte_tokenizer("tipsv2").get_vocab()
