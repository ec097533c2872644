"""Zs3Config: the architecture, the constants of the paper and the names a checkpoint was trained on.

Every number of the paper (arXiv 2301.07336) that the code uses is a field here, with the paper's value as its default.
Numbers of one run (learning rate, data, steps) belong to its recipe.

Two rules for all files are at the end: when two class names are one name, and what a number is.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from difflib import get_close_matches
from functools import cache, wraps
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin
from unicodedata import category, normalize

import numpy as np
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, Mask2FormerConfig, PreTrainedConfig, ResNetConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

TINY, HUGE = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the least normal number, and the largest, of a float32
INT32 = 2**31 - 1
SIZE_DIVISOR = 32  # the coarsest feature map of the pixel decoder

# What transformers writes into a config.json or passes to a config, beside what its base class declares.
WRITTEN_BY_TRANSFORMERS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "keys_to_ignore_at_inference",
    "loss_type",
    "pretraining_tp",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}
# What transformers' base class declared until version 5, without the parameters of generation. Tools still set these
# fields on the config of any model: the Trainer sets token ids, peft sets whether embeddings are tied.
DECLARED_BY_VERSION_4 = {
    "add_cross_attention",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "eos_token_id",
    "finetuning_task",
    "is_decoder",
    "pad_token_id",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
}


@cache
def fields_of_any_config() -> set[str]:
    """The names that any transformers config takes: fields of its base class, and properties that can be set."""
    properties = {
        name
        for kind in PreTrainedConfig.__mro__
        for name, value in vars(kind).items()
        if isinstance(value, property) and value.fset is not None
    }
    return {*PreTrainedConfig.__dataclass_fields__, *properties, *WRITTEN_BY_TRANSFORMERS, *DECLARED_BY_VERSION_4}


# Kinds of image labels of unseen classes that training can get, from the weakest to the strongest.
UnseenLabels = Literal["none", "pseudo", "captions", "ground_truth"]
RegionView = Literal["crops", "single_pass", "mixed"]  # what an image tower sees of proposals, see `embed_proposals`
PatchTokens = Literal["attention", "values"]  # of the last block, see `patch_means`


WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", dict: "a dict", list: "a list"}


def _in_words(kind: Any) -> str:
    """In words, what a field of this type takes."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    if float in parts:
        parts = [part for part in parts if part is not int]
    words = ["None" if part is type(None) else WORDS.get(get_origin(part) or part, "a config") for part in parts]
    return " or ".join(words)


def in_plain_words(config_class: type) -> type:
    """Class decorator: a strict dataclass also takes NumPy's numbers, and its errors are Refused, one short line."""
    make, put = config_class.__init__, config_class.__setattr__

    @wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except Refused:
            raise
        except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:  # of a part's own fields, too
            if isinstance(error.__cause__, Refused):
                raise error.__cause__ from None
            raise Refused(f"a field has a wrong value: {one_line(error.__cause__ or error, 140)}") from error

    def __setattr__(self: Any, name: str, value: Any) -> None:
        field = config_class.__dataclass_fields__.get(name)
        value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        if isinstance(value, list):
            value = [one.item() if isinstance(one, np.generic) else one for one in value]
        if field is not None and isinstance(value, int | float) and not isinstance(value, bool):
            as_number(name, value, *RANGES.get(name, (-HUGE, HUGE)))
        try:
            put(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise Refused(f"{name} must be {_in_words(field.type)}, got {shortened(value)}") from error

    config_class.__init__, config_class.__setattr__ = __init__, __setattr__
    return config_class


# The allowed range of fields, both ends included. Other fields take any finite float32.
RANGES = {
    **dict.fromkeys(("class_temperature", "rank_scale", "clip_logit_scale"), (TINY, HUGE)),
    **dict.fromkeys(("matched_weight", "importance_sample_ratio", "clip_ensemble_weight"), (0, 1)),
    **dict.fromkeys(("word_drop_probability", "dropout"), (0, 1)),
    **dict.fromkeys(("image_label_precision", "image_label_recall"), (0, 1)),
    "pseudo_label_threshold": (TINY, 1),
    **dict.fromkeys(("class_weight", "mask_weight", "dice_weight", "rank_weight"), (0, HUGE)),
    **dict.fromkeys(("label_map_weight", "no_object_weight", "init_std", "init_xavier_std"), (0, HUGE)),
    **dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "projection_dim"), (1, 2**16)),
    **dict.fromkeys(("dim_feedforward", "encoder_feedforward_dim"), (1, 2**16)),
    **dict.fromkeys(("num_attention_heads", "num_queries"), (1, 2**16)),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), (1, 1000)),
    "train_num_points": (1, 10**6),
    "oversample_ratio": (1, 1000),
    "common_stride": (4, 4),  # the stride of the masks
    "proposal_classes": (0, 2**16),
}


@in_plain_words
@strict
class Zs3Config(Mask2FormerConfig):
    """Configuration of Zs3ForSemanticSegmentation. A misspelled or mistyped field raises.

    Fields that are not described here are Mask2FormerConfig's. `train.py --help` shows both descriptions.

    Architecture:
        backbone_config: the backbone's configuration; default ResNet-50 (section 4.3).
        text_config: the frozen text tower's, of CLIP or another encoder (see encoders_zs3); None: text vectors come
            from outside.
        vision_config: the frozen image tower's of the same encoder; None: it is shown no proposal.
        projection_dim: D, the size of the encoder's joint space.
        class_projection: the layers that make the class embeddings E^c: "mlp" (hidden -> 4 x hidden -> D) or "linear".
        class_head: what is compared with text vectors: "learned", the class embeddings E^c (Fig. 2); or "regions", what
            the image tower sees of each proposal, without any training.
        head_is_trained: whether a training step changed the class embeddings. If not, the learned head names nothing.
        region_view: what the image tower sees for class_head "regions": "single_pass", all proposals in one pass over
            the image; "crops", a crop of each; or "mixed", crops of the largest, and one pass for the others.
        patch_tokens: tokens of a single pass of TIPSv2: in the last block they attend to each other ("attention"), or
            keep their own values ("values").
        proposal_classes: number of classes that a joined Mask2Former was trained on, whose class predictor is kept; 0:
            none is kept.
        objectness: multiplies p_q of Eq. 4 by 1 - the probability of "no object" of this class predictor.
        pixel_mean, pixel_std: the normalisation of pixel_values, image_mean and image_std of the image processor.

    Losses:
        class_temperature: tau of Eq. 2, which divides the cosine.
        class_loss: "background_aware" (Eq. 5), or "cross_entropy" with a learned background embedding (Eq. 1-2).
        matched_weight: lambda of Eq. 5; unmatched queries get 1 - lambda.
        kl: "p_u" is KL(p || U) as printed in Eq. 5, "u_p" is KL(U || p).
        class_norm: "groups" takes the means over matched and over unmatched queries in Eq. 5; "queries" their sum, as
            in Eq. 1, over the number of matched ones.
        no_object_weight: weight of unmatched queries in class_loss "cross_entropy" (Mask2Former's).
        class_weight: weight of the class loss, alpha of Eq. 8, and of the class cost in matching.
        mask_weight: weight of the focal or cross-entropy loss of masks, beta of Eq. 8, and of its cost in matching.
        dice_weight: weight of the dice loss of masks, beta of Eq. 8, and of its cost in matching.
        rank_weight: weight of the ranking loss, gamma of Eq. 8.
        rank_scale: multiplies the cosines of Eq. 6; 1 as printed.
        rank_norm: "positives" divides Eq. 6 by |P| as printed, "pairs" by |P||N|.
        label_map_weight: weight of a loss on the label map of Eq. 4, which the paper does not have; 0: no such loss.
        label_map_pixels: pixels of the loss of label_map_weight: "labelled" ones, or "all", where an ignored pixel has
            one of the present labels without a mask.
        mask_loss: "focal" (section 3.2) or "bce" (Mask2Former's), beside dice.
        ignored_pixels: "ignore" leaves ignored pixels out of the mask losses (section 3.2); "negative" counts them as
            outside of every mask (Mask2Former's).
        matching: "unpaired" matches masks and labels apart (sections 3.1-3.2). "joint" gives a query the label of its
            mask, and left-over queries the present labels that have no mask (Mask2Former's). "hybrid" does so in one
            assignment, where those labels compete by similarity.
        match_points: points at which masks are matched: "grid", the middles of the 4 x 4 pixels that a mask pixel
            covers; or "random", train_num_points random ones (Mask2Former's).
        train_num_points: points of a mask in the mask losses (Mask2Former's).
        oversample_ratio: candidates for uncertain points, in train_num_points (Mask2Former's).
        importance_sample_ratio: share of train_num_points that are uncertain points; the others are random.
        use_auxiliary_loss: losses at every decoder output (deep supervision), or at the last one alone.

    Inference and pseudo labels:
        clip_ensemble_weight: weight of the ensemble with CLIP, w of section 4.6, in [0, 1]; None: no ensemble.
        clip_logit_scale: multiplies CLIP's cosines before a softmax; CLIP's training ended with 100.
        pseudo_label_threshold: least score of a pseudo label, tau of section 3.4.
        word_drop_probability: probability with which a word of an image's captions is left out (section 4.5).

    What the training saw:
        seen_class_names: S, all classes whose masks any stage of the training saw; None: not known.
        unseen_labels: the strongest image labels of unseen classes that any stage got: "none", "pseudo", "captions" or
            "ground_truth"; None: not known.
        image_label_precision: precision of the image labels of unseen classes in the last stage that had some: the
            share of them whose class is in the image's label map, in [0, 1]; None: not known, or no stage had some.
        image_label_recall: recall of the same: the share of the classes in these label maps that had a label.
        class_names: the vocabulary that `set_vocabulary` stores in the checkpoint, or None.
    """

    model_type = "zs3"
    sub_configs = dict.fromkeys(("backbone_config", "text_config", "vision_config"), AutoConfig)
    backbones_supported = ["swin", "resnet", "convnext"]
    keys_to_ignore_at_inference = ["loss_terms", "same_label_rate"]  # outputs that the Trainer must not collect

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    class_projection: Literal["mlp", "linear"] = "mlp"
    class_head: Literal["learned", "regions"] = "learned"
    head_is_trained: bool = True
    region_view: RegionView = "single_pass"
    patch_tokens: PatchTokens = "attention"
    proposal_classes: int = 0
    objectness: bool = False
    pixel_mean: list[float | int] | tuple[float | int, ...] = field(default_factory=lambda: list(IMAGENET_DEFAULT_MEAN))
    pixel_std: list[float | int] | tuple[float | int, ...] = field(default_factory=lambda: list(IMAGENET_DEFAULT_STD))

    class_temperature: float | int = 0.01
    class_loss: Literal["background_aware", "cross_entropy"] = "background_aware"
    matched_weight: float | int = 0.6
    kl: Literal["p_u", "u_p"] = "p_u"
    class_norm: Literal["groups", "queries"] = "groups"
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    rank_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    rank_scale: float | int = 1.0
    rank_norm: Literal["positives", "pairs"] = "positives"
    label_map_weight: float | int = 0.0
    label_map_pixels: Literal["all", "labelled"] = "all"
    mask_loss: Literal["focal", "bce"] = "focal"
    ignored_pixels: Literal["ignore", "negative"] = "ignore"
    matching: Literal["unpaired", "joint", "hybrid"] = "unpaired"
    match_points: Literal["grid", "random"] = "grid"

    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0

    clip_ensemble_weight: float | int | None = 0.8
    clip_logit_scale: float | int = 100.0
    pseudo_label_threshold: float | int = 0.99
    word_drop_probability: float | int = 0.25

    seen_class_names: list[str] | None = None
    unseen_labels: UnseenLabels | None = None
    image_label_precision: float | int | None = None
    image_label_recall: float | int | None = None
    class_names: list[str] | None = None

    def __post_init__(self, **kwargs):
        unknown = sorted(set(kwargs) - fields_of_any_config() - set(self.attribute_map))
        if unknown:
            close = get_close_matches(unknown[0], self.__dataclass_fields__, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; a newer version may have it"
            raise ValueError(f"{shortened(unknown[0])} is not a field of Zs3Config{hint}")
        # Made here, not by transformers: how its own sub-config defaults are declared changes between versions.
        if self.backbone_config is None:
            self.backbone_config = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        for name in ("text_config", "vision_config"):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, tower_config(name, **getattr(self, name)))
        super().__post_init__(**kwargs)

    def validate_class_norm(self):
        """Called by `strict`."""
        if self.class_loss == "cross_entropy" and self.class_norm == "queries":
            raise Refused("class_norm 'queries' does not go with class_loss 'cross_entropy': give 'groups'")

    def validate_class_head(self):
        """Called by `strict`."""
        if self.class_head == "regions" and self.vision_config is None:
            raise Refused("class_head 'regions' needs an image tower: give vision_config")
        for name, least in (("pixel_mean", -HUGE), ("pixel_std", TINY)):
            value = getattr(self, name)
            if len(value) != 3:
                raise Refused(f"{name} must be three numbers, got {shortened(value)}")
            setattr(self, name, [as_number(name, one, least) for one in value])
        if self.objectness and not self.proposal_classes:
            raise Refused("objectness needs the class predictor of a joined Mask2Former: give proposal_classes")

    def validate_strides(self):
        """Called by `strict`."""
        strides = self.feature_strides  # of the backbone's stages
        if len(strides) != 4 or min(strides) < 1:
            raise Refused(f"feature_strides must be four whole numbers above 0, got {shortened(strides)}")


def tower_config(name: str, model_type: str | None = None, **fields: Any) -> PreTrainedConfig:
    """The configuration of an encoder's tower; one without a model type is CLIP's. name: its field in Zs3Config."""
    kind = f"clip_{name.replace('config', 'model')}" if model_type is None else model_type
    if kind not in CONFIG_MAPPING:
        raise Refused(f"{name} is of {shortened(kind)}, which this version of transformers does not know")
    return CONFIG_MAPPING[kind](**fields)


# ---- names: when are two names one? -------------------------------------------------------------------------


def plain(name: str) -> str:
    """The form in which class names are compared: two names with the same plain form are one name.

    These make no difference: case, blanks, the way Unicode composes a letter (NFC), and invisible characters.
    """
    if name.isascii():
        folded = name.casefold()
    else:
        shown = "".join(letter for letter in name if category(letter) != "Cf")
        folded = normalize("NFC", normalize("NFD", shown).casefold())
    return " ".join(folded.split())


def places(names: Sequence[str], known: Sequence[str] | None) -> list[int | None]:
    """The first place of each name in the list of known names, or None. known: None is an empty list."""
    first: dict[str, int] = {}
    for place, name in enumerate(known or []):
        first.setdefault(plain(name), place)
    return [first.get(plain(name)) for name in names]


def once(names: Sequence[str]) -> list[str]:
    """The names, without those that repeat an earlier one."""
    return [name for row, (name, first) in enumerate(zip(names, places(names, names), strict=True)) if row == first]


def among(names: Sequence[str], known: Sequence[str] | None) -> list[bool]:
    """Whether each name is among the known names."""
    return [place is not None for place in places(names, known)]


def shared(names: Sequence[str], known: Sequence[str] | None) -> list[str]:
    """The names that are among the known ones."""
    return [name for name, is_known in zip(names, among(names, known), strict=True) if is_known]


def unshared(names: Sequence[str], known: Sequence[str] | None) -> list[str]:
    """The names that are not among the known ones."""
    return [name for name, is_known in zip(names, among(names, known), strict=True) if not is_known]


class Refused(ValueError):
    """An input cannot be used. The message is one line for the user."""


def check_names(names: Sequence[str]) -> None:
    """Raises Refused where names are blank, hold line breaks or control characters, or are one name."""
    for name in names:
        check_name(name)
    for place, first in enumerate(places(names, names)):
        if first != place:
            one, other = shortened(names[first], 45), shortened(names[place], 45)
            which = f"{one} and {other} are one name (case, blanks and Unicode form aside)"
            if names[first] == names[place]:
                which = f"{one} is there twice"
            raise Refused(f"names repeat: {which}: rename one")


def check_name(name: object) -> None:
    """Raises Refused where a name is blank, or holds line breaks or control characters."""
    if not isinstance(name, str) or not plain(name):
        raise Refused(f"a name must be a text that is not blank, got {shortened(name)}")
    if not name.isprintable() and any(category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise Refused(f"a name must be one line without control characters, got {shortened(name)}")


def is_number(value: object, whole: bool = False) -> bool:
    """Whether a value is a finite number of Python or NumPy; whole: a whole number. A boolean is not a number."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


class Number(NamedTuple):
    """The numbers that an option takes (see `is_number`). As a type: Annotated[int, Number(int, 1, 8)]."""

    kind: type  # int or float
    least: float
    most: float
    below: bool = False  # `most` itself is too large

    def of(self, value: object) -> int | float:
        """Python's number. Raises ValueError, whose message says what the value should be."""
        if not is_number(value, whole=self.kind is int):
            raise ValueError("a whole number" if self.kind is int else "a finite number")
        number = int(value) if isinstance(value, Integral) else float(value)
        if self.least == self.most and number != self.least:
            raise ValueError(_figure(self.least))
        if number < self.least:
            positive = self.least == TINY and number <= 0
            raise ValueError("positive" if positive else f"{_figure(self.least)} or more")
        if number > self.most or (self.below and number == self.most):
            raise ValueError(f"{'below' if self.below else 'at most'} {_figure(self.most)}")
        return self.kind(number)


def _figure(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def as_number(name: str, value: object, least: float = -HUGE, most: float = HUGE, whole: bool = False) -> int | float:
    """The value of an option as Python's number. Raises Refused if it is not a number, or not in [least, most]."""
    try:
        return Number(int if whole else float, least, most).of(value)
    except ValueError as error:
        raise Refused(f"{name} must be {error}, got {shortened(value)}") from error


def one_line(error: BaseException, length: int = 110) -> str:
    """The beginning of a library's message, on one line; the name of the error's class if it has no message."""
    return beginning(str(error), length) or type(error).__name__


def beginning(text: str, length: int) -> str:
    """A text on one line, for a message; of a long text only its first characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def shortened(value: object, length: int = 60) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write very long whole numbers
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."


Zs3Config.register_for_auto_class()
