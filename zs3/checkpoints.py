"""Checkpoints as the commands meet them: loaded through the public door, and asked what their training saw."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from configuration_zs3 import plain
from zs3.command_line import InputError, looks_local, one_line
from zs3.label_space import LabelSpace, load_text_embeds


class NoClaim(InputError):
    """A zero-shot number that this checkpoint cannot have."""


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")

# What loading a damaged checkpoint, or one of another architecture, raises.
CHECKPOINT_ERRORS = (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError, SafetensorError)


def check_checkpoint(flag_name: str, path: str, model_type: str) -> None:
    """Before anything is loaded, and without running code of the checkpoint: is it there, and of this model?"""
    if looks_local(path) and not Path(path).is_dir():
        raise InputError(f"--{flag_name} {path}: no such folder (relative paths start where the command does)")
    if (Path(path) / "final").is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(f"--{flag_name} {path} is the folder of a run: did you mean {Path(path) / 'final'}?")
    try:
        found = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    except CHECKPOINT_ERRORS as error:
        raise InputError(f"--{flag_name} {path} cannot be read: {one_line(error)}") from error
    if found != model_type:
        raise InputError(f"--{flag_name} {path} is a checkpoint of {found!r}, not of {model_type!r}")


def load_model(path: str) -> PreTrainedModel:
    """The model of a checkpoint through the public door, in float32, evaluating."""
    check_checkpoint("model", path, "zs3")
    try:
        model, loading = AutoModel.from_pretrained(
            path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
    except CHECKPOINT_ERRORS as error:
        raise InputError(f"cannot load checkpoint {path}: {one_line(error)}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lost = sorted(loading["missing_keys"]) or sorted(str(key[0]) for key in loading["mismatched_keys"])
        raise InputError(f"checkpoint {path} is incomplete: it lacks {lost[0]} ({len(lost)} weights in all)")
    return model.eval()


def load_checkpoint(path: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor through the public door."""
    model = load_model(path)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    except CHECKPOINT_ERRORS as error:
        raise InputError(f"cannot load checkpoint {path}: {one_line(error)}") from error
    return model, processor


def class_vectors(
    model: PreTrainedModel, processor: ProcessorMixin, class_names: list[str], text_embeds: str | None
) -> tuple[Tensor, list[str]]:
    """(C, D) text vectors of names, and the prompts behind them.

    text_embeds: a .npy of ready-made ones, for a checkpoint without a text tower; None: the tower's, or the stored.
    """
    if text_embeds is not None:
        vectors = load_text_embeds(text_embeds, len(class_names), model.config.projection_dim)
        return vectors, [f"vectors of {Path(text_embeds).name}"]
    if model.text_model is not None:
        return model.encode_text(**processor(class_names=class_names)), list(processor.prompt_templates)
    stored = model.config.class_names or []
    missing = [name for name in class_names if name not in stored]
    if missing:
        raise InputError(f"the checkpoint has no text tower and no vector for {missing[0]!r}: give --text_embeds")
    return model.vocabulary[[stored.index(name) for name in class_names]], ["the checkpoint's vocabulary"]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """In safetensors: one file, or an index and its shards in the order of their names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: model.save_pretrained writes it; other formats are not read")
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / INDEX} is no index of weights: copy the whole checkpoint") from error
    lost = [name for name in shards if not (folder / name).is_file()]
    if lost:
        raise InputError(f"{folder} lacks {', '.join(lost)} of its weights: copy the whole checkpoint")
    return [folder / INDEX, *(folder / name for name in shards)]


def weights_sha256(path: str) -> str | None:
    """Of the weights' file; of several, of their hashes in a row. None for a Hub id that was not downloaded."""
    folder = local_folder(path)
    if folder is None:
        return None
    hashes = [file_sha256(file) for file in weight_files(folder) if file.name != INDEX]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def settings_sha256(path: str) -> str | None:
    """Of the configuration, the processor and the tokenizer. None as above."""
    folder = local_folder(path)
    return None if folder is None else _files_sha256(folder / name for name in (*CONFIGS, *TOKENIZER))


def code_sha256(path: str) -> str | None:
    """Of the code that the checkpoint brings. None as above."""
    folder = local_folder(path)
    return None if folder is None else _files_sha256(folder.glob("*.py"))


def _files_sha256(files: Iterable[Path]) -> str:
    told = sorted(f"{file.name} {file_sha256(file)}\n" for file in files if file.is_file())
    return hashlib.sha256("".join(told).encode()).hexdigest()


def local_folder(path: str) -> Path | None:
    """The folder itself, or where the Hub's was downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    cached = [try_to_load_from_cache(path, name) for name in (WEIGHTS, INDEX)]
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def trained_on(config: PreTrainedConfig, names: list[str]) -> list[str]:
    """Those of the names whose masks the training saw; none where that is not known."""
    trained = {plain(name) for name in config.seen_class_names or []}
    return [name for name in names if plain(name) in trained]


def is_trained(config: PreTrainedConfig, names: list[str]) -> Tensor:
    """(C,) bool: of which names the training saw masks."""
    trained = trained_on(config, names)
    return torch.tensor([name in trained for name in names])


class Look(NamedTuple):
    """How a model looks at images: with text vectors (C, D) on its device, and with CLIP's view of the proposals."""

    model: PreTrainedModel
    processor: ProcessorMixin
    text_embeds: Tensor
    is_trained: Tensor  # (C,) bool
    view: str  # "off" for no ensemble
    weight: float | None = None  # of the ensemble; None: the checkpoint's
    tolerance: float = 0.0

    def __call__(self, inputs: BatchFeature, size: tuple[int, int]) -> ModelOutput:
        """The model's output of one image, whose label map is wanted at this size (H, W)."""
        outputs = self.model(**inputs, text_embeds=self.text_embeds)
        if self.view == "off":
            return outputs
        return self.model.ensemble(
            outputs,
            self.processor.to_rgb(inputs["pixel_values"]),
            self.text_embeds,
            is_seen=self.is_trained,
            weight=self.weight,
            view=self.view,
            tolerance=self.tolerance,
            image_sizes=[size],
        )


def check_no_unseen_masks(config: PreTrainedConfig, label_space: LabelSpace, claim: str) -> None:
    """The leak guard. claim: what cannot be had otherwise, for the message."""
    if config.seen_class_names is None:
        raise NoClaim(f"the checkpoint does not say which classes its training saw masks of: no {claim}")
    leaked = trained_on(config, label_space.unseen)
    if leaked:
        raise NoClaim(f"the checkpoint was trained on masks of {leaked}, which are unseen here: no {claim}")
