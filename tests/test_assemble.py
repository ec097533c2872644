"""`zs3 assemble`: the parts in the checkpoint, a stranger who uses it, what it says of them, and what it refuses."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, change_json, save_checkpoint, tiny_encoder, tiny_mask2former
from tiny_run import RECIPE, flags, write_data
from transformers import Mask2FormerImageProcessorPil, Mask2FormerModel, ResNetConfig

from encoders_zs3 import FAMILIES
from eval import main as eval_main
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3Processor
from train import main as train_main
from zs3 import doctor
from zs3.checkpoints import load_checkpoint, load_model
from zs3.command_line import InputError, run
from zs3.files import file_sha256
from zs3.label_space import load_label_space
from zs3.release import __main__ as release
from zs3.release import assemble, export
from zs3.release.__main__ import visited
from zs3.scenes.dataset import write_dataset
from zs3.training.arguments import TrainArgs

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
    assert model.config.class_head == "regions" and not model.config.objectness
    processor = Zs3Processor.from_pretrained(tmp_path / "made")
    assert processor.prompt_templates == list(FAMILIES[family].templates)
    assert (
        processor.image_processor.size["shortest_edge"] == 48
        and list(processor.image_processor.image_mean) == [0.5] * 3
    )
    assert model.config.pixel_mean == [0.5] * 3
    modes = {path.stat().st_mode for path in (tmp_path / "made").iterdir()}
    assert len(modes) == 1  # safetensors alone makes files that others cannot read
    assert "Zs3ForSemanticSegmentation" in visited(tmp_path / "made", ["sky", "grass"])


def test_the_card_says_what_it_is_made_of(call, parts, tmp_path):
    call()
    card = (tmp_path / "made" / "README.md").read_text()
    digests = {name: file_sha256(parts / name / "model.safetensors")[:12] for name in ("proposals", "clip")}
    assert f"| proposals, trained on unknown masks | proposals | sha256 {digests['proposals']} | mit |" in card
    assert f"| text and image encoder (CLIP) | clip | sha256 {digests['clip']} | not declared |" in card
    assert "no zero-shot result can be claimed on any benchmark" in card


def own_proposals(folder, **fields):
    """A checkpoint of train.py. Its head and its encoder are others than those that it is joined with."""
    save_checkpoint(folder, vision=True, **{"seen_class_names": ["sky", "grass"], "unseen_labels": "none"} | fields)
    return folder


@every_family
def test_the_proposals_of_a_checkpoint_of_train_py_are_named_and_keep_their_record(call, tmp_path, capsys, family):
    own = own_proposals(tmp_path / "own")
    call(family, proposals=own)
    one, other = (Zs3ForSemanticSegmentation.from_pretrained(tmp_path / name) for name in ("own", "made"))
    picture = torch.rand(1, 3, 48, 64)
    assert torch.equal(one.propose(picture)["mask_logits"], other.propose(picture)["mask_logits"])
    assert other.config.class_head == "regions" and other.vocabulary is None
    assert other.config.projection_dim == {"clip": 12, "tipsv2": 16}[family]
    assert other.config.seen_class_names == ["sky", "grass"] and other.config.unseen_labels == "none"
    card = (tmp_path / "made" / "README.md").read_text()
    told = " ".join(card.split())
    assert "saw masks of these classes alone: sky, grass. A zero-shot result can be claimed where" in told
    assert "The training had no image labels of unseen classes." in told
    with pytest.raises(InputError, match="--objectness needs the class predictor of a Mask2Former, and"):
        call(family, proposals=own, output=tmp_path / "another", objectness=True)


def test_a_joined_checkpoint_can_be_joined_with_another_encoder(call, tmp_path):
    call("clip")
    call("tipsv2", proposals=tmp_path / "made", output=tmp_path / "again", objectness=True)
    again = Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "again")
    for name, value in tiny_mask2former().state_dict().items():
        if not name.startswith("criterion."):
            assert torch.equal(again.state_dict()[name], value), name


def test_a_tiny_encoder_brings_its_own_prompts_to_training(call, parts, tmp_path, monkeypatch):
    """Those of its processor_config.json, as `zs3 assemble` and pseudo labels take them."""
    shutil.copytree(parts / "tipsv2", tmp_path / "encoder")
    (tmp_path / "encoder" / "processor_config.json").write_text(json.dumps({"prompt_templates": ["one {}"]}))
    write_data(tmp_path)
    words = flags(tmp_path / "scenes", tmp_path / "out", encoder=tmp_path / "encoder", text_embeds=None, max_steps=1)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train_main()
    assert Zs3Processor.from_pretrained(tmp_path / "out" / "final").prompt_templates == ["one {}"]
    call(encoder=tmp_path / "encoder")
    assert Zs3Processor.from_pretrained(tmp_path / "made").prompt_templates == ["one {}"]


def test_the_card_counts_what_each_benchmark_shares_with_the_masks(call, parts, tmp_path):
    """By name: sofa is an unseen class of VOC."""
    shutil.copytree(parts / "proposals", tmp_path / "ade")
    names = load_label_space("ade20k_150").class_names
    tiny_mask2former(150).save_pretrained(tmp_path / "ade")
    change_json(tmp_path / "ade" / "config.json", id2label=dict(enumerate(names)))
    call(proposals=tmp_path / "ade")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "the masks of all classes of ADE20K (150 classes)" in card
    assert "| ade20k_150 | 150 of 150 | - |" in card
    assert "| voc_20 | 8 of 20 | 1 of 5 |" in card
    assert "scenes" not in card


def test_names_of_the_same_data_are_all_shared():
    names = load_label_space("coco_stuff_171").class_names
    rows = {row["name"]: row for row in assemble.shared_classes(names)}
    assert rows["coco_stuff_171"] == {"name": "coco_stuff_171", "classes": "171 of 171", "unseen": "15 of 15"}
    panoptic = ["mirror-stuff", "door-stuff", "tree-merged", "floor-other-merged"]  # "tree" and "floor-other" there
    assert {row["name"]: row for row in assemble.shared_classes(panoptic)}["coco_stuff_171"]["classes"] == "4 of 171"


def test_a_vocabulary_is_no_record_of_masks(call, tmp_path):
    """A joined checkpoint of unknown masks stays so, whatever names are stored in it."""
    call()
    change_json(tmp_path / "made" / "config.json", id2label=dict(enumerate(load_label_space("ade20k_150").class_names)))
    call(proposals=tmp_path / "made", output=tmp_path / "again")
    assert "saw is not known" in (tmp_path / "again" / "README.md").read_text()


def test_the_image_labels_of_proposals_are_on_the_card(call, tmp_path):
    call(proposals=own_proposals(tmp_path / "own", unseen_labels="ground_truth"))
    assert "ground-truth image labels of unseen classes" in (tmp_path / "made" / "README.md").read_text()


def test_parts_in_shards_are_joined(call, parts, tmp_path, capsys):
    whole = tiny_mask2former()
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    call(proposals=tmp_path / "shards")
    count = sum(value.numel() for value in whole.state_dict().values())
    count += sum(value.numel() for value in load_file(parts / "clip" / "model.safetensors").values())
    assert f"parts     {count / 1e6:.0f} M weights; joining them takes about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["person", "banner", "blanket", "wall-brick", "tree-merged"], "COCO-panoptic"),
        ([f"class {index}" for index in range(150)], "unknown masks"),
        (load_label_space("ade20k_150").class_names, "ADE20K (150 classes)"),
    ],
)
def test_masks_are_known_by_the_names_of_their_classes(names, words):
    config = tiny_mask2former().config
    config.id2label = dict(enumerate(names))
    assert assemble.masks_of(config) == words


@pytest.mark.parametrize(("family", "dtype"), [("clip", "bfloat16"), ("tipsv2", "float16")])
def test_half_precision_is_half_the_size(call, tmp_path, family, dtype):
    call(family, dtype=dtype)
    half = (tmp_path / "made" / "model.safetensors").stat().st_size
    call(family, output=tmp_path / "whole")
    assert half < 0.55 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert "Zs3ForSemanticSegmentation" in visited(tmp_path / "made", ["sky", "grass"])


def test_what_cannot_be_joined_is_one_line_and_leaves_nothing(call, parts, tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    Mask2FormerModel(tiny_mask2former().config).save_pretrained(tmp_path / "headless")
    wrong = {
        "--encoder": ({"encoder": tmp_path / "resnet"}, "is a checkpoint of 'resnet', not of 'clip' or 'tipsv2'"),
        "family": ({"proposals": parts / "clip"}, "is a 'clip': give it as --encoder"),
        "missing": ({"encoder": "./nowhere"}, "no such folder"),
        "revision": ({"encoder_revision": "main"}, "is for a Hub id"),
        "headless": ({"proposals": tmp_path / "headless"}, "weights of the network are missing (class_predictor.bias)"),
    }
    for given, words in wrong.values():
        with pytest.raises(InputError) as refusal:
            call(**given)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match="exists already"):
        call()


def test_an_offline_machine_and_a_gated_checkpoint_are_one_line(call, tmp_path, monkeypatch):
    from huggingface_hub import errors

    answer = type("Answer", (), {"headers": {}, "request": None, "status_code": 403})()
    for error, words in (
        (
            errors.LocalEntryNotFoundError("offline"),
            "it is no folder here, and the Hub cannot be reached: check the name",
        ),
        (errors.GatedRepoError("gated", response=answer), "is gated: accept its terms on the Hub"),
        (errors.RepositoryNotFoundError("no", response=answer), "is not on the Hub, or is private"),
        (errors.OfflineModeIsEnabled("offline"), "it is no folder here, and HF_HUB_OFFLINE is set"),
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


@every_family
def test_stage_1_starts_from_it_with_a_learned_head_and_resumes(call, tmp_path, monkeypatch, family):
    """The final model is lost after the last checkpoint: the same command makes it again, and it names."""
    call(family)
    data = write_data(tmp_path)
    recipe = {name: value for name, value in RECIPE.items() if name in TrainArgs.__dataclass_fields__}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = flags(data, tmp_path / "out", init_from=tmp_path / "made", text_embeds=None, max_steps=1)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        train_main()
        final = tmp_path / "out" / "final"
        model = Zs3ForSemanticSegmentation.from_pretrained(final).eval()
        assert model.config.class_head == "learned" and model.config.head_is_trained
        assert model.class_predictor is None and not model.config.objectness
        text = torch.randn(2, model.config.projection_dim)
        assert model(torch.randn(1, 3, 64, 64), text_embeds=text).class_logits.shape == (1, 5, 2)
        shutil.rmtree(final)


@every_family
def test_release_doctor_and_evaluation_take_it_and_export_says_why_not(call, tmp_path, monkeypatch, capsys, family):
    call(family)
    made, result, released = (str(tmp_path / name) for name in ("made", "ovs.json", "released"))
    write_dataset(tmp_path / "scenes", num_train=1, num_validation=1, seed=0)
    ways = {
        eval_main: [
            *("--model", made, "--dataset", str(tmp_path / "scenes")),
            *("--setting", "ovs", "--output", result),
        ],
        release.main: [*("--model", made, "--repo_id", "you/day-one", "--results", result), "--output", released],
        doctor.main: [made],
    }
    for main, words in ways.items():
        monkeypatch.setattr(sys, "argv", ["command", *words])
        main()
    card = (tmp_path / "released" / "README.md").read_text()
    assert "joined from two parts" in card and "## Results" in card and "| mIoU |" in card
    said = capsys.readouterr().out
    assert FAMILIES[family].title in said
    assert "without training, from what the image tower sees of each proposal (single_pass)" in said
    monkeypatch.setattr(sys, "argv", ["zs3 export", "--model", made, "--output", str(tmp_path / "x.pt2")])
    with pytest.raises(InputError, match="class_head 'regions' cannot be exported"):
        export.main()


def test_a_part_that_is_not_whole_is_one_line(call, parts, tmp_path):
    shutil.copytree(parts / "clip", tmp_path / "blind")
    state = load_file(tmp_path / "blind" / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("vision")}
    save_file(kept, tmp_path / "blind" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(parts / "tipsv2", tmp_path / "oblong")
    config = json.loads((tmp_path / "oblong" / "config.json").read_text())
    config["vision_config"]["image_size"] = [16, 16]
    (tmp_path / "oblong" / "config.json").write_text(json.dumps(config))
    shutil.copytree(parts / "proposals", tmp_path / "unscaled")
    change_json(tmp_path / "unscaled" / "preprocessor_config.json", do_normalize=False)
    wrong = [
        ({"encoder": tmp_path / "blind"}, "the encoder lacks weights of a CLIP: 'vi"),
        ({"encoder": tmp_path / "oblong"}, "an image tower must have square pictures"),
        ({"proposals": tmp_path / "unscaled"}, "turns do_rescale or do_normalize off"),
        ({"prompt_templates": "nothing"}, "--prompt_templates needs '{}'"),
    ]
    for given, words in wrong:
        with pytest.raises(InputError) as refusal:
            call(**given)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        assert not (tmp_path / "made").exists()


def test_a_readme_that_cannot_be_read_is_no_obstacle(call, parts, tmp_path):
    shutil.copytree(parts / "proposals", tmp_path / "proposals")
    (tmp_path / "proposals" / "README.md").write_text("---\nlicense: [mit\n---\n")
    call(proposals=tmp_path / "proposals")
    assert "not readable" in (tmp_path / "made" / "README.md").read_text()
    (tmp_path / "proposals" / "README.md").write_text("---\nlicense: [mit, other]\n---\n")
    assert assemble.licence_of(tmp_path / "proposals") == "mit, other"


def test_the_same_command_makes_the_same_weights(call, tmp_path):
    call()
    call(output=tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again"))
    assert first == second


def test_regions_do_not_see_wrong_colours(call, tmp_path):
    call()
    change_json(tmp_path / "made" / "config.json", pixel_mean=[0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="image_mean and image_std are not pixel_mean and pixel_std"):
        load_checkpoint(str(tmp_path / "made"))


def test_another_number_of_classes_is_refused(call, tmp_path):
    call()
    change_json(tmp_path / "made" / "config.json", proposal_classes=9)
    with pytest.raises(InputError, match=r"the shape differs of class_predictor"):
        load_model(str(tmp_path / "made"))
