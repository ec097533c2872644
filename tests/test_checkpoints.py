"""Checkpoints: whose code runs when a command loads one, and what is refused before its numbers are believed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLASS_NAMES, byte_tokenizer, save_checkpoint
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerModel, ResNetBackbone

from configuration_zs3 import Zs3Config, among, shared, unshared
from eval import evaluate
from text_zs3 import TextCache
from zs3.checkpoints import (
    check_checkpoint,
    check_finite,
    class_vectors,
    code_sha256,
    load_checkpoint,
    load_model,
    load_processor,
    load_texts,
)
from zs3.command_line import InputError
from zs3.evaluation.arguments import EvalArgs
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES as SCENES
from zs3.scenes.render import UNSEEN

ROOT = Path(__file__).parents[1]
WEIGHT = "class_projection.0.weight"
PARTS = ("backbone_config", "text_config", "vision_config", "image_processor")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "final"
    model = save_checkpoint(folder, vision=True)
    model.config.seen_class_names = [name for name in SCENES if name not in UNSEEN]
    model.config.unseen_labels = "none"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "c")


def refused(path: Path, load: Callable[[str], object] = load_checkpoint) -> str:
    """The line that the checkpoint is refused with."""
    with pytest.raises(InputError) as caught:
        load(str(path))
    line = str(caught.value)
    assert "\n" not in line and len(line.replace(str(path), "")) <= 200
    return line


def change(path: Path, changes: dict, part: str | None = None) -> None:
    """Of a JSON file, or of the mapping called `part` in it; ... takes the key out."""
    content = json.loads(path.read_text())
    inner = content if part is None else content[part]
    inner.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del inner[key]
    path.write_text(json.dumps(content))


# ---- whose code runs ----------------------------------------------------------------------------------------

# Answers yes to every question, and goes through all roads on which a checkpoint is loaded.
ROADS = """
import sys
from pathlib import Path
import eval
from accelerate import Accelerator
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from zs3 import pseudo_labels
from zs3.evaluation import ensemble_weight, figure
from zs3.release import __main__ as release, export
from zs3.command_line import InputError, read_arguments
from zs3.training.arguments import TrainArgs
from zs3.training.folder import save_final
from zs3.training.start import make_start

folder, marker = Path(sys.argv[1]), Path(sys.argv[2])
model, data, out = folder / "zs3", folder / "data", folder / "out"
export.save = lambda *_: None
export.export_visual = lambda model: None

def go(command, *words):
    sys.argv = ["command", *map(str, words)]
    try:
        command.main()
        done = "done"
    except InputError as error:
        done = str(error)
    print(command.__name__, "RAN" if marker.exists() else "ok", done)
    marker.unlink(missing_ok=True)

go(eval, "--model", model, "--dataset", data, "--num_workers", 0)
go(figure, "--models", model, "--dataset", data, "--images", "00000", "--output", out)
go(pseudo_labels, "--model", model, "--dataset", data, "--output", out / "labels")
go(ensemble_weight, "--model", model, "--dataset", data, "--unseen_labels", out / "labels", "--num_images", 1)
go(export, "--model", model, "--output", out / "part.pt2")
go(release, "--model", model, "--repo_id", "me/x", "--output", out / "release")

class Starts:
    __name__ = "train"
    def main(self):
        args, overrides = read_arguments(TrainArgs)
        start = make_start(args, SIZES, Accelerator(cpu=True))
        made, name = start.model, "-".join(Path(word).name for word in sys.argv[1:5])
        save_final(made, start.processor, out / name)
        made.config.name_or_path = str(model)
        made.set_vocabulary(["sky", "grass"])  # by the processor beside that checkpoint

SIZES = {}
given = ("--dataset", data, "--output_dir", out)
go(Starts(), "--init_from", model, *given)
SIZES = SMALL
go(Starts(), "--encoder", folder / "clip", *given)
go(Starts(), "--encoder", folder / "clip", "--backbone", folder / "backbone", *given)
SIZES = {}
go(Starts(), "--encoder", folder / "clip", "--proposals", folder / "mask2former", *given)
go(Starts(), "--encoder", folder / "clip", "--backbone", folder / "unknown", *given)
print("registered", "zs3" in CONFIG_MAPPING, any("zs3" in kind.__name__.lower() for kind in MODEL_MAPPING))
go(eval, "--model", folder / "trusted", "--dataset", data, "--num_workers", 0, "--trust_remote_code")
"""
SMALL = {
    **dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "dim_feedforward"), 32),
    **{"encoder_feedforward_dim": 32, "num_queries": 5, "decoder_layers": 3, "encoder_layers": 1},
    "num_attention_heads": 2,
}


def make_hostile(folder: Path, line: str) -> None:
    """Every file of code that transformers may run is this line, and every place that may name code names it."""
    (folder / "custom_generate").mkdir()
    names = ("configuration_zs3", "modeling_zs3", "processing_zs3", "pipeline_zs3", "evil", "custom_generate/generate")
    for name in names:
        (folder / f"{name}.py").write_text(f"{line}\nclass Evil: pass\n")
    kinds = ("Config", "Model", "Backbone", "Processor", "ImageProcessor", "Tokenizer", "ModelForImageClassification")
    code = {f"Auto{kind}": "evil.Evil" for kind in kinds} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    pipelines = {"evil": {"impl": "evil.Evil", "pt": ["AutoModel"], "type": "multimodal"}}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            change(
                folder / name, {"auto_map": code} | ({"custom_pipelines": pipelines} if name == "config.json" else {})
            )
            for part in set(PARTS) & json.loads((folder / name).read_text()).keys():
                change(folder / name, {"auto_map": code}, part)


def test_code_beside_a_checkpoint_runs_where_the_flag_was_given_and_nowhere_else(saved, tmp_path):
    marker = tmp_path / "marker"
    line = f"open({str(marker)!r}, 'w').close()"
    config = Zs3Config.from_pretrained(saved)
    towers = {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}
    CLIPModel(CLIPConfig(**towers, projection_dim=12)).save_pretrained(tmp_path / "clip")
    byte_tokenizer().save_pretrained(tmp_path / "clip")
    ResNetBackbone(config.backbone_config).save_pretrained(tmp_path / "backbone")
    Mask2FormerModel(Mask2FormerConfig(backbone_config=config.backbone_config, **SMALL)).save_pretrained(
        tmp_path / "mask2former"
    )
    shutil.copytree(saved, tmp_path / "zs3")
    shutil.copytree(tmp_path / "backbone", tmp_path / "unknown")
    change(tmp_path / "unknown" / "config.json", {"model_type": "evil"})
    for name in ("zs3", "clip", "backbone", "mask2former", "unknown"):
        make_hostile(tmp_path / name, line)
    shutil.copytree(saved, tmp_path / "trusted")
    code = tmp_path / "trusted" / "modeling_zs3.py"
    code.write_text(f"{line}\n{code.read_text()}")
    write_dataset(tmp_path / "data", num_train=1, num_validation=1, seed=0)

    done = subprocess.run(
        [sys.executable, "-c", ROADS.replace("SMALL", repr(SMALL)), str(tmp_path), str(marker)],
        cwd=ROOT,
        input="y\n" * 50,
        capture_output=True,
        text=True,
        env=dict(os.environ, ACCELERATE_USE_CPU="true"),
    )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.split()[1:2] in (["ok"], ["RAN"])]
    commands = [
        "eval",
        "zs3.evaluation.figure",
        "zs3.pseudo_labels",
        "zs3.evaluation.ensemble_weight",
        "zs3.release.export",
    ]
    expected = [f"{name} ok done" for name in commands]
    assert told[:5] == expected
    assert told[5].startswith("zs3.release.__main__ ok ") and "this project does not have" in told[5]
    assert told[6:10] == ["train ok done"] * 4
    assert told[10].startswith("train ok ") and "not of a model that transformers has" in told[10]
    assert told[11:] == ["eval RAN done"]
    assert "registered False False" in done.stdout
    for path in (tmp_path / "out").rglob("*.json"):  # nor is such code named in what was saved
        assert "evil.Evil" not in path.read_text(), path


def calls(path: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """(what is called, as written; its keywords) of every call in a file."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), {word.arg: word.value for word in node.keywords}) for node in found]


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("zs3/**/*.py"), *ROOT.glob("benchmarks/*.py")])
def test_code_of_others_is_trusted_through_the_flag_alone(path):
    """zs3/stranger.py is the user who has not got the project."""
    for called, keywords in calls(path) if path.name != "stranger.py" else ():
        trusted = keywords.get("trust_remote_code")
        assert trusted is None or ast.unparse(trusted) in ("False", "trust_remote_code", "args.trust_remote_code")
        assert called != "pipeline", "transformers' pipeline asks the Auto classes"
        if called.startswith("Auto") and called.endswith(".from_pretrained"):
            assert trusted is not None, f"{called} may ask whether code shall run"


@pytest.mark.parametrize(
    "files",
    [
        ("eval.py", "zs3/evaluation/arguments.py"),
        ("zs3/evaluation/ensemble_weight.py",),
        ("zs3/evaluation/figure.py",),
        ("zs3/pseudo_labels.py",),
        ("zs3/release/__main__.py",),
        ("zs3/release/export.py",),
    ],
)
def test_the_flag_of_a_command_reaches_what_it_loads(files):
    tree = ast.parse("\n".join((ROOT / name).read_text() for name in files))
    named = ("load_model", "load_checkpoint", "load_config")
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    loads = [ast.unparse(node) for node in called if node.func.id in named]
    assert loads and all("trust_remote_code" in load for load in loads)
    flags = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    assert any(flag.startswith("trust_remote_code: bool = flag(False, ") for flag in flags)


def test_the_hash_of_the_code_is_of_that_which_runs(saved, checkpoint):
    own = code_sha256(str(saved))
    assert own == code_sha256(str(saved), trust_remote_code=True)  # save_pretrained copied this project's
    (checkpoint / "losses_zs3.py").write_text("changed")
    assert code_sha256(str(checkpoint)) == own != code_sha256(str(checkpoint), trust_remote_code=True)


def test_what_c24e825_wrote_loads_and_scores_as_it_did(tmp_path):
    shutil.unpack_archive(ROOT / "tests" / "fixtures" / "c24e825.zip", tmp_path)
    before = json.loads((tmp_path / "result" / "gzs3.json").read_text())
    result = evaluate(EvalArgs(model=str(tmp_path / "checkpoint"), dataset=str(tmp_path / "scenes"), num_workers=0))
    for name in ("miou", "miou_seen", "miou_unseen", "hiou", "pixel_accuracy"):
        assert result[name] == pytest.approx(before[name], abs=2e-3), name  # some pixels may differ on another machine
    assert result["checkpoint_sha256"] == before["checkpoint_sha256"]


# ---- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ('{"model_type": "zs3", ', "is no JSON"),
        ("[]", "holds no mapping"),
        ("3", "holds no mapping"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is no JSON"),
        ("{}", "is a checkpoint of None"),
        ('{"model_type": "bert"}', "is a checkpoint of 'bert'"),
        ('{"model_type": ["zs3"]}', "is a checkpoint of"),
    ],
)
def test_a_config_that_is_none_is_refused(checkpoint, text, words):
    (checkpoint / "config.json").write_text(text)
    assert words in refused(checkpoint)


def test_a_folder_without_config_or_with_another_thing_in_its_place_is_refused(checkpoint):
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is no JSON" in refused(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refused(checkpoint)
    (checkpoint / "config.json").mkdir()
    assert "has no config.json" in refused(checkpoint)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        (None, {"of_tomorrow": 1}, "'of_tomorrow' is not a field of Zs3Config; a newer version may have it"),
        (None, {"num_queries": "5"}, "num_queries"),
        (None, {"num_queries": -5}, "-5"),
        (None, {"hidden_dim": 0}, ""),
        (None, {"hidden_dim": 64}, "incomplete"),
        (None, {"num_attention_heads": 0}, ""),
        (None, {"activation_function": "evil"}, "evil"),
        (None, {"class_names": 3}, "class_names"),
        (None, {"class_names": ["sky"]}, "the shape differs of vocabulary"),
        (None, {"seen_class_names": [1]}, "seen_class_names"),
        (None, {"id2label": "x"}, ""),
        (None, {"dtype": "evil"}, "evil"),
        (None, {"backbone_config": [1]}, "backbone_config"),
        (None, {"backbone_config": {"depths": [1]}}, ""),
        (None, {"backbone_config": {"model_type": "evil"}}, "evil"),
        (None, {"text_config": "x"}, "text_config"),
        ("backbone_config", {"depths": "abc"}, "depths"),
        ("backbone_config", {"hidden_sizes": [8]}, ""),
        ("backbone_config", {"out_features": ["stage9"]}, "out_features"),
        ("text_config", {"vocab_size": "x"}, "vocab_size"),
        ("text_config", {"num_attention_heads": 0}, ""),
        ("vision_config", {"patch_size": 0}, ""),
        (None, {"id2label": {"0": [[[[[]]]]]}, "quantization_config": {"quant_method": "x"}}, "quantization_config"),
        (None, {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("text_config", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        (None, {"configuration_files": ["config.9.0.0.json"]}, "configuration_files"),
    ],
)
def test_settings_of_the_model_that_cannot_be_are_one_line(checkpoint, part, changes, words):
    change(checkpoint / "config.json", changes, part)
    assert words in refused(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.1, 0.2]}, "image_mean"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_std": [float("nan"), 1, 1]}, "NaN is no number"),
        ({"size": {"shortest_edge": "48", "longest_edge": "96"}}, "size"),
        ({"size": {"shortest_edge": 4.5}}, "size"),
        ({"size": {"shortest_edge": 0, "longest_edge": 96}}, "size"),
        ({"size": {"longest_edge": 96}}, "size"),
        ({"size": [1]}, ""),
        ({"size": None}, "size"),
        ({"ignore_index": 1.5}, "ignore_index"),
        ({"ignore_index": "255"}, "ignore_index"),
        ({"ignore_index": True}, "ignore_index"),
        ({"size_divisor": 0}, "size_divisor"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"resample": 99}, "resample"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "do_center_crop"),
        ({"return_tensors": "x"}, "return_tensors"),
        ({"to_rgb": 3}, "to_rgb"),
    ],
)
def test_settings_of_the_pictures_that_cannot_be_are_one_line(checkpoint, changes, words):
    change(checkpoint / "processor_config.json", changes, "image_processor")
    assert words in refused(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"prompt_templates": wrong}, "prompt_templates must") for wrong in ("a {}", 3, [3], ["a photo"], [], None)),
        ({"image_processor": [1]}, ""),
        ({"image_processor": ...}, "processor"),
        ({"audio_tokenizer": {"audio_tokenizer_class": "AutoModel"}}, "audio_tokenizer"),
    ],
)
def test_settings_of_the_processor_that_cannot_be_are_one_line(checkpoint, changes, words):
    change(checkpoint / "processor_config.json", changes)
    assert words in refused(checkpoint)


def test_saved_prompts_are_used_and_missing_ones_are_those_of_c24e825(checkpoint):
    change(checkpoint / "processor_config.json", {"prompt_templates": ["one {}", "two {}"]})
    assert load_checkpoint(str(checkpoint))[1].prompt_templates == ["one {}", "two {}"]
    change(checkpoint / "processor_config.json", {"prompt_templates": ...})
    assert len(load_checkpoint(str(checkpoint))[1].prompt_templates) == 14


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [*(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool), torch.float8_e4m3fn, torch.complex64]
)
def test_weights_that_are_no_floats_are_refused_by_name(checkpoint, dtype):
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {WEIGHT: weights[WEIGHT].to(dtype)}, checkpoint / "model.safetensors", {"format": "pt"})
    assert WEIGHT in refused(checkpoint)
    assert WEIGHT in refused(checkpoint, lambda path: check_checkpoint("init_from", path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_loaded_as_float32(checkpoint, dtype):
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {WEIGHT: weights[WEIGHT].to(dtype)}, checkpoint / "model.safetensors", {"format": "pt"})
    model = load_model(str(checkpoint))
    torch.testing.assert_close(model.get_parameter(WEIGHT).detach(), weights[WEIGHT].to(dtype).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WEIGHT, "vocabulary", "text_model.text_model.final_layer_norm.bias"])
def test_values_that_are_no_numbers_are_counted_and_named(checkpoint, name, value):
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[[1, 4]] = value
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert f"{name} holds 2 NaN or infinite values" in refused(checkpoint)


def test_large_but_finite_values_are_numbers():
    layer = torch.nn.BatchNorm1d(3)
    layer.running_var.fill_(torch.finfo(torch.float32).max)
    check_finite(layer, "it")
    layer.running_mean[2] = float("nan")
    with pytest.raises(InputError, match="^it: running_mean holds 1 NaN"):
        check_finite(layer, "it")


@pytest.mark.parametrize(
    "name",
    [
        *("../saved/w.safetensors", "/w.safetensors", "part/w.safetensors", "part\\w.safetensors", "..\\w.safetensors"),
        *("w.bin", "w.safetensors\n", ".safetensors", "C:w.safetensors", "", 3, None, ["w.safetensors"]),
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(checkpoint, name):
    names = list(load_file(checkpoint / "model.safetensors"))
    (checkpoint / "model.safetensors").rename(checkpoint / "w.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "w.safetensors")}
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    load_model(str(checkpoint))
    index["weight_map"][WEIGHT] = name
    path.write_text(json.dumps(index))
    assert "no .safetensors file of its own folder" in refused(checkpoint)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "w.safetensors"}])
def test_an_index_of_another_form_is_refused(checkpoint, index):
    (checkpoint / "model.safetensors").rename(checkpoint / "w.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in refused(checkpoint)


def test_links_of_a_cache_are_followed(checkpoint):
    blob = checkpoint.parent / ("0" * 64)
    (checkpoint / "model.safetensors").rename(blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    loaded = load_model(str(checkpoint)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in load_file(blob).items())


def test_weights_are_read_from_safetensors_and_nothing_else(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    shard = checkpoint / "shard-00000-model-00001-of-00001.safetensors"  # as parallel training leaves them
    shutil.copy(checkpoint / "model.safetensors", shard)
    assert f"{shard.name} would change the weights of model.safetensors" in refused(checkpoint)
    shard.unlink()
    adapter = checkpoint / "adapter_config.json"  # of peft, which transformers would put onto the model
    adapter.write_text("{}")
    assert f"{adapter.name} would change the weights of model.safetensors" in refused(checkpoint)
    adapter.unlink()
    whole = (checkpoint / "model.safetensors").read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2]):
        (checkpoint / "model.safetensors").write_bytes(content)
        assert "is no whole weight file" in refused(checkpoint) and "header" in refused(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(checkpoint)


# ---- the tokenizer ------------------------------------------------------------------------------------------


def without(word: str) -> Callable[[dict], None]:
    return lambda content: content["model"]["vocab"].pop(word)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("a</w>"), "cannot spell 'a'"),
        (without("a"), "cannot spell 'aa'"),
        (without("?</w>"), "cannot spell '?'"),
        (lambda content: content["model"]["vocab"].update({"b</w>": 64 + 256}), "cannot spell"),
        (lambda content: content["model"]["vocab"].update(zebra=514), "has token 514"),
        (lambda content: content["model"].update(vocab={}), "cannot be used"),
        (lambda content: content["model"].update(merges=["q zz"]), "tokenizer cannot be read"),
        (lambda content: content["model"].update(merges=3), "tokenizer cannot be read"),
        (lambda content: content.clear(), "tokenizer cannot be read"),
    ],
)
def test_a_tokenizer_that_is_not_the_text_towers_is_refused(checkpoint, damage, words):
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    damage(content)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    assert words in refused(checkpoint)
    text_config = Zs3Config.from_pretrained(checkpoint).text_config
    assert words in refused(checkpoint, lambda path: load_texts(path, text_config))  # training's road


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_max_length": 1}, "cuts texts at 1 tokens"),
        ({"model_max_length": "x"}, "cuts texts at 'x' tokens"),
        ({"eos_token": "<|startoftext|>"}, "ends texts by token 512"),
        ({"fast_tokenizer_files": ["tokenizer.0.json"]}, "fast_tokenizer_files"),
    ],
)
def test_settings_of_a_tokenizer_that_make_all_names_one_are_refused(checkpoint, changes, words):
    change(checkpoint / "tokenizer_config.json", changes)
    assert words in refused(checkpoint)


def test_a_tokenizer_of_two_files_is_whole_and_one_of_none_or_one_is_refused(saved, checkpoint):
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    (checkpoint / "tokenizer.json").unlink()
    assert "there is no tokenizer.json (nor vocab.json)" in refused(checkpoint)
    (checkpoint / "vocab.json").write_text(json.dumps(vocabulary))
    assert "there is no tokenizer.json (nor merges.txt)" in refused(checkpoint)
    (checkpoint / "merges.txt").write_text("#version: 0.2\n")
    texts = ["a photo of a sky", "zebra"]
    one, other = (load_checkpoint(str(path))[1].tokenizer(texts)["input_ids"] for path in (saved, checkpoint))
    assert one == other


# ---- names --------------------------------------------------------------------------------------------------


def test_what_training_saw_is_known_by_any_spelling_of_a_name():
    config = Zs3Config(seen_class_names=["Red  Circle", "caf\u00e9"], text_config=None)
    names = ["red circle", "sky", "cafe\u0301", "RED CIRCLE\u200b"]
    assert shared(names, config.seen_class_names) == [names[0], *names[2:]]
    assert unshared(names, config.seen_class_names) == [names[1]] and unshared(names, None) == names
    assert among(names, config.seen_class_names) == [True, False, True, True] and among(names, None) == [False] * 4


def test_text_vectors_of_a_cache_need_no_second_look_at_the_tower(tmp_path, monkeypatch):
    model, cache = save_checkpoint(tmp_path), TextCache(None)
    processor = load_processor(str(tmp_path), model.config)
    first, prompts = class_vectors(model, processor, CLASS_NAMES, None, cache)
    assert torch.equal(first, class_vectors(model, processor, CLASS_NAMES, None)[0])
    monkeypatch.setattr(model, "encode_text", None)
    assert torch.equal(class_vectors(model, processor, CLASS_NAMES, None, cache)[0], first)
    assert prompts == processor.prompt_templates


def test_stored_vectors_are_found_by_any_spelling_of_a_name(tmp_path):
    model = save_checkpoint(tmp_path, text=False)
    vectors, _ = class_vectors(model, None, ["Blue  Square", "SKY"], None)
    assert torch.equal(vectors, model.vocabulary[[CLASS_NAMES.index("blue square"), 0]])
    with pytest.raises(InputError, match="no vector for 'zebra'"):
        class_vectors(model, None, ["sky", "zebra"], None)
