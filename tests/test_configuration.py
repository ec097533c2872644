"""Zs3Config: the paper's numbers, refused mistakes, and an exact JSON round trip."""

import json
import math

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import CLASS_NAMES, save_checkpoint, tiny_config
from transformers import PreTrainedConfig

from configuration_zs3 import Zs3Config, among, check_names, places, plain

# ValueError of ours, or huggingface_hub's for a field's type.
REFUSED = (ValueError, TypeError, StrictDataclassError)


def test_defaults_are_the_papers():
    config = Zs3Config()
    paper = {
        "class_temperature": 0.01,
        "matched_weight": 0.6,  # lambda
        "class_weight": 2,  # alpha
        "mask_weight": 5,  # beta
        "dice_weight": 5,
        "rank_weight": 1,  # gamma
        "num_queries": 100,
        "class_loss": "background_aware",
        "kl": "p_u",
        "class_norm": "groups",
        "rank_norm": "positives",
        "mask_loss": "focal",
        "matching": "unpaired",
        "class_projection": "mlp",
        "projection_dim": 512,
    }
    assert {name: getattr(config, name) for name in paper} == paper
    assert config.model_type == "zs3"
    assert config.backbone_config.model_type == "resnet"
    assert list(config.backbone_config.depths) == [3, 4, 6, 3]  # ResNet-50
    assert config.backbone_config.layer_type == "bottleneck"
    assert config.text_config is None and config.vision_config is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clas_weight", 2.0),  # misspelled
        ("temperature", 0.01),  # a generation parameter's name, which transformers would drop in silence
        ("matched_weigth", 0.6),
        ("class_temperature", "0.01"),  # wrong type
        ("num_queries", "100"),
        ("projection_dim", 512.5),
        ("rank_weight", None),
        ("class_names", "sky"),
        ("seen_class_names", [1, 2]),
        ("kl", "reverse"),  # wrong choice
        ("class_norm", "query"),
        ("class_loss", "focal"),
        ("mask_loss", "dice"),
        ("matching", "paired"),
        ("rank_norm", "mean"),
        ("ignored_pixels", "zero"),
        ("match_points", "all"),
        ("class_projection", "MLP"),
        ("class_temperature", 0),  # out of range
        ("class_temperature", -0.01),
        ("matched_weight", 1.5),
        ("dice_weight", -1),
        ("rank_scale", 0),
        ("oversample_ratio", 0.5),
        ("importance_sample_ratio", 1.5),
        ("pseudo_label_threshold", 1.5),
        ("clip_ensemble_weight", -0.1),
        ("clip_logit_scale", 0.0),
    ],
)
def test_a_mistake_is_refused_by_name(field, value):
    with pytest.raises(REFUSED, match=field):
        Zs3Config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_weight", True),
        ("class_weight", np.bool_(True)),
        ("class_weight", float("nan")),
        ("class_weight", np.float32("inf")),
        ("class_weight", 10**400),
        ("num_queries", 0),
        ("num_queries", 2.0),
        ("projection_dim", True),
        ("encoder_layers", -1),
        ("dropout", -0.1),
        ("common_stride", 8),
        ("common_stride", 2),
        ("backbone_config", "x"),
        ("feature_strides", [4, 8, 16]),
        ("feature_strides", [4, 8, 16, 0]),
        ("kl", "x" * 10_000),
        ("class_names", "x" * 10_000),
    ],
)
def test_what_is_refused_is_named_in_one_short_line(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be ") as error:
        Zs3Config(**{field: value})
    assert len(str(error.value)) <= 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone_config": {"model_type": "x" * 3000}},
        {"dtype": "x" * 5000},
        {"text_config": {"hidden_size": float("nan")}},
        {"id2label": "x"},
        {"num_labels": float("nan")},
    ],
)
def test_what_a_part_refuses_is_one_short_line(fields):
    with pytest.raises(ValueError) as error:
        Zs3Config(**fields)
    assert len(str(error.value)) <= 200 and "\n" not in str(error.value)


def test_a_number_is_checked_whenever_it_is_set(tmp_path):
    config = Zs3Config()
    for name, value in (("class_temperature", float("nan")), ("dropout", 7.0), ("num_queries", 0)):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            setattr(config, name, value)
        with pytest.raises(ValueError, match=f"^{name} must be "):
            config.update({name: value})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class_temperature must be "):
        Zs3Config.from_pretrained(tmp_path, class_temperature=-1.0)


def test_numbers_of_numpy_become_pythons():
    strides = Zs3Config(feature_strides=np.array([4, 8, 16, 32])).feature_strides
    assert strides == Zs3Config(feature_strides=[np.int64(4), 8, 16, 32]).feature_strides == [4, 8, 16, 32]
    assert {type(stride) for stride in strides} == {int}
    config = Zs3Config(class_weight=np.float32(2), num_queries=np.int64(7), use_auxiliary_loss=np.bool_(False))
    kinds = [type(getattr(config, name)) for name in ("class_weight", "num_queries", "use_auxiliary_loss")]
    assert kinds == [float, int, bool]
    config.rank_weight = np.float64(0.5)
    assert type(config.rank_weight) is float and json.loads(config.to_json_string())["num_queries"] == 7


def test_a_misspelled_field_gets_a_hint():
    with pytest.raises(ValueError, match="'rank_wieght' is not a field of Zs3Config; did you mean 'rank_weight'"):
        Zs3Config(rank_wieght=1.0)


def test_a_mistake_in_a_saved_file_is_refused_by_name(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "rank_wieght": 1.0}))
    with pytest.raises(ValueError, match="rank_wieght"):
        Zs3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field", ["class_temperature", "matched_weight", "class_weight", "mask_weight", "dice_weight", "rank_weight"]
)
def test_integers_are_numbers(field):
    assert getattr(Zs3Config(**{field: 1}), field) == 1


def test_the_norm_of_the_class_loss_is_saved_and_older_files_have_the_default(tmp_path):
    tiny_config(class_norm="queries").save_pretrained(tmp_path)
    saved = Zs3Config.from_pretrained(tmp_path)
    assert saved.class_norm == "queries"
    with pytest.raises(ValueError, match="class_norm 'queries' does not go with"):  # as a start of train.py
        Zs3Config(**{**saved.to_dict(), "class_loss": "cross_entropy"})
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["class_norm"]
    file.write_text(json.dumps(fields))
    assert Zs3Config.from_pretrained(tmp_path).class_norm == "groups"


def test_a_sum_over_queries_is_refused_for_the_baseline():
    line = "^class_norm 'queries' does not go with class_loss 'cross_entropy': give 'groups'$"
    with pytest.raises(ValueError, match=line):
        Zs3Config(class_loss="cross_entropy", class_norm="queries")
    assert Zs3Config(class_loss="cross_entropy", class_norm="groups").class_norm == "groups"


def test_every_field_survives_json(tmp_path):
    config = tiny_config(
        vision=True,
        class_temperature=0.07,
        class_loss="cross_entropy",
        matched_weight=0.75,
        clip_ensemble_weight=None,
        kl="u_p",
        class_weight=3,
        mask_weight=4.5,
        dice_weight=3.5,
        rank_weight=0.3,
        no_object_weight=0.2,
        rank_norm="pairs",
        mask_loss="bce",
        matching="hybrid",
        match_points="random",
        ignored_pixels="negative",
        rank_scale=10,
        class_projection="linear",
        seen_class_names=["sky", "über"],
        class_names=["sky", "über", "dog, puppy"],
    )
    config.save_pretrained(tmp_path / "once")
    again = Zs3Config.from_pretrained(tmp_path / "once")
    assert again.to_dict() == config.to_dict()
    assert (again.class_temperature, again.kl, again.seen_class_names) == (0.07, "u_p", ["sky", "über"])
    again.save_pretrained(tmp_path / "twice")
    files = [(tmp_path / folder / "config.json").read_bytes() for folder in ("once", "twice")]
    assert files[0] == files[1]


def test_a_checkpoints_config_survives_json(tmp_path):
    model = save_checkpoint(tmp_path)
    config = Zs3Config.from_pretrained(tmp_path)
    saved, loaded = model.config.to_dict(), config.to_dict()
    assert loaded.pop("_name_or_path", None) in (None, str(tmp_path), saved.get("_name_or_path"))
    saved.pop("_name_or_path", None)
    assert loaded == saved
    assert config.class_names == CLASS_NAMES
    assert config.id2label == dict(enumerate(CLASS_NAMES))
    assert config.label2id == {name: index for index, name in enumerate(CLASS_NAMES)}
    assert config.auto_map == {
        "AutoConfig": "configuration_zs3.Zs3Config",
        "AutoModel": "modeling_zs3.Zs3ForSemanticSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_zs3.Zs3ForSemanticSegmentation",
        "AutoModelForUniversalSegmentation": "modeling_zs3.Zs3ForSemanticSegmentation",
    }
    (custom_pipeline,) = config.custom_pipelines.values()
    assert custom_pipeline["impl"] == "pipeline_zs3.Zs3Pipeline"
    assert list(custom_pipeline["pt"]) == ["AutoModel"]


@pytest.mark.parametrize("field", [name for name, value in Zs3Config().to_dict().items() if type(value) is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(field, value):
    with pytest.raises(REFUSED, match=field):
        Zs3Config(**{field: value})


# ------------------------------------------------------------------------------------------------- names

ONE_NAME = [
    ("cow", "Cow"),
    ("traffic light", " Traffic   LIGHT "),
    ("traffic light", "traffic\u00a0light"),  # a blank that does not break
    ("caf\u00e9", "cafe\u0301"),  # one letter, or two that make one
    ("\u1e9bx", "\u017f\u0307x"),
    ("stra\u00dfe", "STRASSE"),
    ("\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2", "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3"),  # a final sigma
    ("cow", "c\u00adow"),  # a hyphen that does not show
    ("cow", "\ufeffcow"),  # a byte order mark
]
TWO_NAMES = [
    ("cow", "cows"),
    ("a-b", "a b"),
    ("trafficlight", "traffic light"),
    ("\u0131rmak", "irmak"),  # a Turkish i without a dot
    ("resume", "r\u00e9sum\u00e9"),
    ("a1", "a\u00b9"),
    ("\u0430", "a"),  # Cyrillic
]


@pytest.mark.parametrize(("one", "other"), ONE_NAME)
def test_spellings_of_one_name_are_one(one, other):
    assert plain(one) == plain(other) and plain(plain(one)) == plain(one)
    assert among([other, "x"], ["y", one]) == [True, False] and places([one], ["y", other, one]) == [1]
    with pytest.raises(ValueError) as refused:
        check_names(["x", one, other])
    assert repr(one) in str(refused.value) and repr(other) in str(refused.value)


@pytest.mark.parametrize(("one", "other"), TWO_NAMES)
def test_names_that_differ_are_two(one, other):
    check_names([one, other])
    assert among([one], [other]) == [False] and places([other], [one]) == [None]


@pytest.mark.parametrize(
    "name",
    ["", " ", "\t", "\u200b", "\u00a0\u00ad", "a\nb", "a\r", "\x00", "a\u2029b", "\x7f", "\ud800", None, 3, b"a"],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="a name must be"):
        check_names(["x", name])


def test_nothing_is_among_no_names():
    assert among(["a"], None) == among(["a"], []) == [False] and places([], ["a"]) == []
    check_names([])


def test_a_long_list_of_long_names_is_refused_in_a_short_line():
    with pytest.raises(ValueError, match="are one name") as refused:
        check_names([f"{'long ' * 100}{number % 500}{' ' * (1 + number // 500)}x" for number in range(1000)])
    assert len(str(refused.value)) <= 200


# ------------------------------------------------------------------------------------- fields of any config

OF_ANY_CONFIG = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "architectures": ["Zs3ForSemanticSegmentation"],
    "problem_type": "regression",
    "tie_word_embeddings": False,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "sep_token_id": 4,
    "decoder_start_token_id": 4,
    "is_decoder": False,
    "add_cross_attention": False,
    "tokenizer_class": "CLIPTokenizer",
    "task_specific_params": {"a": 1},
    "torchscript": False,
    "finetuning_task": "x",
    "hidden_size": 64,  # Mask2Former's other names of hidden_dim and decoder_layers
    "num_hidden_layers": 3,
    "num_labels": 5,
}


@pytest.mark.parametrize("field", OF_ANY_CONFIG)
@pytest.mark.parametrize("how", ["given", "set"])
def test_what_any_transformers_config_takes_is_taken_and_kept(field, how, tmp_path):
    value = OF_ANY_CONFIG[field]
    config = Zs3Config(**{field: value}) if how == "given" else Zs3Config()
    if how == "set":
        setattr(config, field, value)
    config.save_pretrained(tmp_path / "once")
    again = Zs3Config.from_pretrained(tmp_path / "once")
    assert getattr(again, field) == value
    again.save_pretrained(tmp_path / "twice")
    assert Zs3Config.from_pretrained(tmp_path / "twice").to_dict() == again.to_dict()


def test_all_that_transformers_writes_of_its_plainest_config_is_taken():
    fields = PreTrainedConfig().to_dict()
    assert len(fields) > 10
    assert Zs3Config(**{**fields, "model_type": "zs3"}).to_dict().keys() >= fields.keys()
    Zs3Config(**{**fields, "use_cache": False, "attn_implementation": "eager", "torch_dtype": "float16"})


def test_a_long_misspelled_field_is_refused_in_a_short_line():
    for name in ("rank_wieght" * 40, "tie_word_embedings", "pad_tokn_id"):
        with pytest.raises(ValueError, match="is not a field of Zs3Config") as refused:
            Zs3Config(**{name: 1})
        assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)
