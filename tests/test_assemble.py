"""`zs3 assemble`: the parts in the checkpoint, a stranger who uses it, what it says of them, and what it refuses."""

import json
import sys

import pytest
import torch
from tiny import byte_tokenizer, change_json, tiny_encoder, tiny_mask2former
from transformers import Mask2FormerImageProcessorPil, Mask2FormerModel, ResNetConfig

from encoders_zs3 import FAMILIES
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3Processor
from zs3.command_line import InputError, run
from zs3.release import assemble
from zs3.release.__main__ import visited

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a Mask2Former and of each family's encoder, as published."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_mask2former().save_pretrained(folder / "proposals")
    size = {"shortest_edge": 48, "longest_edge": 96}
    Mask2FormerImageProcessorPil(size=size, image_mean=[0.5] * 3).save_pretrained(folder / "proposals")
    (folder / "proposals" / "README.md").write_text("---\nlicense: mit\n---\n# Proposals\n")
    for family in FAMILIES:
        tiny_encoder(family).save_pretrained(folder / family)
        byte_tokenizer(family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def call(parts, tmp_path, monkeypatch):
    def call(encoder: str = "clip", **flags: object) -> int:
        given = {"proposals": parts / "proposals", "encoder": parts / encoder, "output": tmp_path / "made"} | flags
        words = [str(word) for name, value in flags.items() | given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["zs3 assemble", *words])
        return assemble.main()

    return call


@every_family
def test_the_parts_are_in_the_checkpoint_and_a_stranger_names_with_it(call, parts, tmp_path, capsys, family):
    call(family)
    assert "the checkpoint is in" in capsys.readouterr().out
    model = Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "made")
    weights = model.state_dict()
    for name, value in tiny_mask2former().state_dict().items():
        if not name.startswith("criterion."):
            assert torch.equal(weights[name], value), name
    encoder = tiny_encoder(family)
    for name, value in encoder.state_dict().items():
        if name not in ("logit_scale", "temperature"):
            prefix, _, rest = name.partition(".")
            own = {f"text_model.{name}", f"vision_model.{name}", name} | ({f"{prefix}.{rest}"} if rest else set())
            assert any(key in weights and torch.equal(weights[key], value) for key in own), name
    scale = encoder.logit_scale.exp() if family == "clip" else 1 / encoder.temperature
    assert model.config.clip_logit_scale == pytest.approx(float(scale), rel=1e-5)
    assert model.config.class_head == "regions" and model.config.objectness
    processor = Zs3Processor.from_pretrained(tmp_path / "made")
    assert processor.prompt_templates == list(FAMILIES[family].templates)
    assert (
        processor.image_processor.size["shortest_edge"] == 48
        and list(processor.image_processor.image_mean) == [0.5] * 3
    )
    assert model.config.pixel_mean == [0.5] * 3
    assert "Zs3ForSemanticSegmentation" in visited(tmp_path / "made", ["sky", "grass"])


def test_the_card_says_what_it_is_made_of(call, parts, tmp_path):
    call()
    card = (tmp_path / "made" / "README.md").read_text()
    assert "| proposals, trained on unknown masks | proposals | - | mit |" in card
    assert "| text and image encoder (CLIP) | clip | - | not declared |" in card
    assert "no zero-shot result can be claimed on any benchmark" in card and "was not evaluated" in card


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["person", "banner", "blanket", "wall-brick", "tree-merged"], "COCO-panoptic"),
        ([f"class {index}" for index in range(150)], "unknown masks"),
    ],
)
def test_masks_are_known_by_the_names_of_their_classes(names, words):
    config = tiny_mask2former().config
    config.id2label = dict(enumerate(names))
    assert assemble.masks_of(config) == words


def test_half_precision_is_half_the_size(call, tmp_path):
    call(dtype="bfloat16")
    half = (tmp_path / "made" / "model.safetensors").stat().st_size
    call(output=tmp_path / "whole")
    assert half < 0.55 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert "Zs3ForSemanticSegmentation" in visited(tmp_path / "made", ["sky", "grass"])


def test_what_cannot_be_joined_is_one_line_and_leaves_nothing(call, parts, tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    Mask2FormerModel(tiny_mask2former().config).save_pretrained(tmp_path / "headless")
    wrong = {
        "--encoder": ({"encoder": tmp_path / "resnet"}, "is a checkpoint of 'resnet', not of 'clip' or 'tipsv2'"),
        "family": ({"proposals": parts / "clip"}, "is a checkpoint of 'clip', not of 'mask2former'"),
        "missing": ({"encoder": "./nowhere"}, "no such folder"),
        "revision": ({"encoder_revision": "main"}, "is for a Hub id"),
        "headless": ({"proposals": tmp_path / "headless"}, "weights that are missing (class_predictor.bias)"),
    }
    for flags, words in wrong.values():
        with pytest.raises(InputError) as refusal:
            call(**flags)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match="exists already"):
        call()


def test_an_offline_machine_and_a_gated_checkpoint_are_one_line(call, tmp_path, monkeypatch):
    from huggingface_hub import errors

    answer = type("Answer", (), {"headers": {}, "request": None, "status_code": 403})()
    for error, words in (
        (errors.LocalEntryNotFoundError("offline"), "the Hub cannot be reached: give a folder"),
        (errors.GatedRepoError("gated", response=answer), "is gated: accept its terms on the Hub"),
        (errors.RepositoryNotFoundError("no", response=answer), "is not on the Hub, or is private"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(assemble, "snapshot_download", fail)
        with pytest.raises(InputError, match=words):
            call(proposals="facebook/mask2former")


def test_the_command_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zs3 assemble"])
    with pytest.raises(SystemExit) as end:
        run(assemble.main)
    assert end.value.code == 2 and "--proposals" in capsys.readouterr().err


def test_training_starts_from_an_assembled_checkpoint_with_a_learned_head(call, tmp_path):
    from zs3.training.start import load_whole

    call()
    model = load_whole(str(tmp_path / "made"), {})
    assert model.config.class_head == "learned" and model.class_predictor is None and not model.config.objectness


def test_a_checkpoint_that_lost_its_class_predictor_is_refused(call, tmp_path):
    call()
    change_json(tmp_path / "made" / "config.json", proposal_classes=9)
    from zs3.checkpoints import load_model

    with pytest.raises(InputError, match=r"the shape differs of class_predictor"):
        load_model(str(tmp_path / "made"))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["proposal_classes"] == 9
