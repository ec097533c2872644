"""Checkpoints for the commands: their files are checked, they are loaded, and leaks of unseen masks are refused.

Loading uses this project's classes. Only with --trust_remote_code does it use transformers' Auto classes, which run the
code that lies beside a checkpoint.
"""

import hashlib
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_zs3
from configuration_zs3 import Zs3Config, beginning, check_names, is_number, one_line, places, shared, shortened
from files_zs3 import is_leftover
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, check_colours, saved_processor, saved_templates, saved_tokenizer
from text_zs3 import TextCache, check_text_embeds, embed_labels, read_labels
from zs3.command_line import InputError, in_one_line, looks_local, shown
from zs3.files import file_sha256
from zs3.label_space import LabelSpace, load_text_embeds
from zs3.typed_json import read_json


class NoClaim(InputError):
    """No zero-shot result can be claimed with this checkpoint on this label space."""


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")

# Settings of an image processor. The first must be set. The others must not be set: label maps do not follow them.
NEEDED = ("do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb", "size", "resample")
NOT_OURS = ("do_center_crop", "data_format", "input_data_format", "return_tensors", "device")
FLOATS = ("F16", "BF16", "F32", "F64")  # the names of types in safetensors headers
LETTERS = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation})
COUNTS = ("num_batches_tracked", "position_ids", "relative_position_index")  # buffers of type I64

# Settings that make transformers fetch code or weights from elsewhere, or read another file of the checkpoint.
# Neither this project nor transformers writes them into a checkpoint of this project.
LEAD_ELSEWHERE = {
    *("audio_tokenizer", "configuration_files", "fast_tokenizer_files", "gguf_file", "quantization_config"),
    "transformers_weights",
}
KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation"}  # a name, or a repository
ADAPTER = "adapter_config.json"  # where peft is installed, transformers puts the adapter onto the model
PARALLEL_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers prefers it to WEIGHTS


TROUBLES = {  # of a download, the more special first
    GatedRepoError: "it is gated: accept its terms on the Hub, then `hf auth login`",
    RepositoryNotFoundError: "it is no folder here, and is not on the Hub, or is private: check the name, or `hf auth "
    "login`",
    LocalEntryNotFoundError: "it is no folder here, and the Hub cannot be reached: check the name, or the network",
    OfflineModeIsEnabled: "it is no folder here, and HF_HUB_OFFLINE is set: check the name, or unset it",
}


# ---- before anything is loaded ------------------------------------------------------------------------------


@contextmanager
def refusing(thing: str) -> Iterator[None]:
    """Turns an error of a library into one line. thing: what failed, for the message.

    A damaged checkpoint, or one of another architecture, makes the libraries raise errors of nearly every type.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        said = f"nothing is called {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(beginning(f"{thing}: {trouble_of(error) or said}", 190)) from error


def trouble_of(error: BaseException | None) -> str | None:
    """What TROUBLES say of an error, or of one that it was raised from."""
    while error is not None:
        for kind, words in TROUBLES.items():
            if isinstance(error, kind):
                return words
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def check_checkpoint(flag_name: str, path: str, model_types: Sequence[str] | None = ("zs3",)) -> None:
    """Refuses a checkpoint that is missing, of another model or damaged. Loads nothing and runs no code of it.

    model_types: the types that it may be of; None: any type that transformers has. Files are checked if they are on
        this disk.
    """
    if looks_local(path) and not Path(path).is_dir():
        raise InputError(f"--{flag_name} {shown(path)}: no such folder (relative paths start at the current folder)")
    config = config_of(f"--{flag_name}", path)
    found = config.get("model_type")
    known = CONFIG_MAPPING if model_types is None else model_types
    if not (isinstance(found, str) and found in known):
        wanted = "of a model that transformers has" if model_types is None else f"of {' or '.join(map(repr, known))}"
        raise InputError(f"--{flag_name} {shown(path)} is a checkpoint of {shortened(found)}, not {wanted}")
    check_settings("config.json", config)
    folder = local_folder(path)
    if folder is None:
        return
    for name in CONFIGS[1:]:
        if (folder / name).is_file():
            check_settings(name, read_settings(folder / name))
    if model_types == ("zs3",) or any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        check_weights(folder)


def config_of(flag: str, path: str) -> dict:
    """The content of a checkpoint's config.json."""
    if Path(path).is_dir():
        file = Path(path, "config.json")
        if Path(path, "final").is_dir() and not file.is_file():
            raise InputError(f"{flag} {path} is the folder of a run: give its final/ instead")
        if not file.is_file():
            raise InputError(
                f"{flag} {shown(path)} is no checkpoint: it has no config.json, which model.save_pretrained writes"
            )
        return read_settings(file)
    with refusing(f"{flag} {shown(path)} cannot be read"):
        return PreTrainedConfig.get_config_dict(path)[0]


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping."""
    return read_json(path, dict[str, Any], "configuration of a checkpoint", "copy the whole checkpoint")


def entries(content: object) -> Iterator[tuple[str, object]]:
    """The keys of settings with their values, at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def check_settings(file_name: str, content: dict) -> None:
    for key, value in entries(content):
        if key in LEAD_ELSEWHERE and value is not None or key in KERNELS and "/" in str(value):
            raise InputError(f"{file_name} has {key}, which loads code or weights from elsewhere: remove it")


def check_weights(folder: Path) -> None:
    """Checks the headers of the weight files. The weights themselves are not read."""
    for path in folder.iterdir():
        if PARALLEL_SHARD.match(path.name) or path.name == ADAPTER:
            raise InputError(f"{shown(path)} would change the weights of {WEIGHTS}: move it away")
    for path, name, kind, _ in weight_headers(folder):
        if kind not in FLOATS and not (kind == "I64" and name.rpartition(".")[2] in COUNTS):
            raise InputError(f"{path.name}: {name} is of type {kind}, weights are {', '.join(FLOATS)}: save it anew")


# ---- loading ------------------------------------------------------------------------------------------------


def load_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint, loaded as `load_model` loads the model."""
    with refusing(f"cannot load checkpoint {shown(path)}"):
        if trust_remote_code:
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return Zs3Config.from_pretrained(path)


def load_model(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint, in float32, in eval mode. trust_remote_code: run the code beside the checkpoint."""
    check_checkpoint("model", path)
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= {"dtype": torch.float32}
    with refusing(f"cannot load checkpoint {shown(path)}"):
        if trust_remote_code:
            model, loading = AutoModel.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        else:
            model, loading = Zs3ForSemanticSegmentation.from_pretrained(path, **options)
    for keys, trouble in (("missing_keys", "it lacks"), ("mismatched_keys", "the shape differs of")):
        lost = sorted(key if isinstance(key, str) else str(key[0]) for key in loading[keys])
        if lost:
            raise InputError(
                f"checkpoint {shown(path)} is incomplete: {trouble} {lost[0]} ({len(lost)} weights in all)"
            )
    if not Path(path).is_dir():  # it may have been downloaded only now
        folder = local_folder(path)
        if folder is not None:
            check_weights(folder)
    check_finite(model, path)
    with in_one_line(f"the vocabulary of {shown(path)}"):
        check_names(model.config.class_names or [])
    return model.eval()


def load_processor(path: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor beside a checkpoint: a Zs3Processor if it has a text tower, else a Zs3ImageProcessor."""
    with refusing(f"cannot load the processor of {shown(path)}"):
        if trust_remote_code:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        else:
            processor = saved_processor(path, text=config.text_config is not None)
    image_processor = getattr(processor, "image_processor", processor)
    if isinstance(image_processor, Zs3ImageProcessor):
        check_image_processor(path, image_processor)
    with in_one_line(shown(path)):
        check_colours(config, image_processor)
    if config.text_config is not None:
        if not hasattr(processor, "tokenizer"):
            raise InputError(
                f"{shown(path)} has a text tower but no Zs3Processor, which processor.save_pretrained writes"
            )
        check_tokenizer(path, processor.tokenizer, config.text_config)
    return processor


def load_texts(
    path: str, text_config: PreTrainedConfig, family: Sequence[str] | None = None
) -> tuple[PreTrainedTokenizerBase, Sequence[str]]:
    """The tokenizer and the prompt templates of a checkpoint of this project, or of an encoder.

    text_config: of its text tower. family: see `saved_templates`.
    """
    with refusing(f"cannot load the tokenizer of {shown(path)}"):
        tokenizer = saved_tokenizer(path)
    check_tokenizer(path, tokenizer, text_config)
    with refusing(shown(path)):
        return tokenizer, saved_templates(path, family=family)


def load_checkpoint(path: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    model = load_model(path, trust_remote_code)
    return model, load_processor(path, model.config, trust_remote_code)


# ---- checks after loading -----------------------------------------------------------------------------------


def check_finite(model: nn.Module, name: str) -> None:
    """Refuses NaN and infinite weights. name: the checkpoint, for the message."""
    state = model.state_dict()
    key = not_finite(state)
    if key is not None:
        count = int((~state[key].isfinite()).sum())
        raise InputError(f"{name}: {key} holds {count} NaN or infinite values: take another copy, or train anew")


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinite values. Of a sharded tensor, this process's part is checked."""
    for name, tensor in state.items():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if own.is_floating_point() and own.numel() and not torch.stack(own.detach().aminmax()).isfinite().all():
            return name  # aminmax of a tensor with a NaN is NaN
    return None


def check_image_processor(path: str, processor: Zs3ImageProcessor) -> None:
    """Refuses an image processor that lacks a setting, or does not fit RGB images and label maps."""
    fits = {
        **dict.fromkeys(NEEDED, lambda value: value is not None),
        **dict.fromkeys(NOT_OURS, lambda value: value is None or value is False),
        **dict.fromkeys(("image_mean", "image_std"), lambda value: isinstance(value, list | tuple) and len(value) == 3),
        **dict.fromkeys(("rescale_factor", "size_divisor"), lambda value: value is not None and value > 0),
    }
    wrong = [name for name, is_right in fits.items() if not is_right(getattr(processor, name))]
    wrong += [name for name in vars(processor) if callable(getattr(type(processor), name, None))]  # hides a method
    if wrong:
        value = shortened(getattr(processor, wrong[0]))
        raise InputError(f"the image processor of {shown(path)} has a wrong {wrong[0]}, {value}: save it anew")


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, text_config: PreTrainedConfig) -> None:
    """Refuses a tokenizer that cannot spell names, or has tokens that the text tower does not have."""
    longest, most = tokenizer.model_max_length, text_config.max_position_embeddings
    if not is_number(longest) or longest < most:
        raise InputError(
            f"{shown(path)}: tokenizer_config.json cuts texts at {shortened(longest)} tokens, the tower at {most}: "
            "take the tower's own tokenizer"
        )
    largest, rows = max(tokenizer.get_vocab().values(), default=0), text_config.vocab_size
    if largest >= rows:
        raise InputError(
            f"{shown(path)}: tokenizer.json has token {largest}, but the text tower has {rows} tokens: take the "
            "tower's own tokenizer"
        )
    texts = [*LETTERS, *(2 * letter for letter in LETTERS)]  # a letter within a word and at its end
    with refusing(f"{shown(path)}: tokenizer.json cannot be used"):
        spelled = [tuple(tokens) for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for text, tokens in zip(texts, spelled, strict=True):
        if not tokens or tokenizer.unk_token_id in tokens or spelled.count(tokens) > 1:
            raise InputError(f"{shown(path)}: tokenizer.json cannot spell {text!r}: is it missing or damaged?")
    if text_config.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: in CLIP's own configurations
        ends = f"by token {tokenizer.eos_token_id}, the text tower by {text_config.eos_token_id}"
        raise InputError(f"{shown(path)}: its tokenizer ends texts {ends}: take the tower's own tokenizer.json")


# ---- vectors ------------------------------------------------------------------------------------------------


def class_vectors(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    class_names: list[str],
    text_embeds: str | None,
    cache: TextCache | None = None,
) -> tuple[Tensor, list[str]]:
    """(C, D) text vectors of class names, and the prompts that they come from.

    text_embeds: a .npy file of vectors, for a checkpoint without a text tower. None: vectors of the text tower; without
        a tower, those of the checkpoint's vocabulary.
    cache: see `embed_labels`.
    """
    if text_embeds is not None:
        vectors = load_text_embeds(text_embeds, len(class_names), model.config.projection_dim)
        return vectors, [f"vectors of {Path(text_embeds).name}"]
    if model.text_model is not None:
        with in_one_line("class names"):
            vectors = embed_labels(read_labels(class_names, processor.prompt_templates), model, processor, cache)
        return vectors, list(processor.prompt_templates)
    rows = places(class_names, model.config.class_names)
    if None in rows:
        missing = class_names[rows.index(None)]
        raise InputError(f"the checkpoint has no text tower and no vector for {missing!r}: give --text_embeds")
    vectors = model.vocabulary[rows]
    with in_one_line("the checkpoint's vocabulary"):
        check_text_embeds(vectors, model.config.projection_dim)
    return vectors, ["the checkpoint's vocabulary"]


# ---- files --------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The weight files (safetensors): one file, or an index and then its shards, sorted by name."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}, which model.save_pretrained writes; other formats are not read")
    weight_map = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} is no index of weights: copy the whole checkpoint")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise InputError(f"{INDEX} names {shortened(name)}, no .safetensors file of its own folder: save it anew")
    shards = sorted(set(weight_map.values()))
    lost = [name for name in shards if not (folder / name).is_file()]
    if lost:
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise InputError(f"{shown(folder)} lacks {lost[0]}{more} of its weights: copy the whole checkpoint")
    return [folder / INDEX, *(folder / name for name in shards)]


def weight_headers(folder: Path) -> Iterator[tuple[Path, str, str, list[int]]]:
    """Of each weight its file, name, type and shape. The weights themselves are not read."""
    for path in weight_files(folder):
        if path.name == INDEX:
            continue
        with (
            refusing(f"{shown(path)} is no whole weight file, copy it again"),
            safe_open(path, framework="pt") as tensors,
        ):
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = [(path, name, part.get_dtype(), part.get_shape()) for name, part in parts.items()]
        yield from found


def weights_sha256(path: str) -> str | None:
    """The digest of the weights; of shards, the digest of their digests. None: a Hub id that was not downloaded."""
    folder = local_folder(path)
    if folder is None:
        return None
    hashes = [file_sha256(file) for file in weight_files(folder) if file.name != INDEX]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def settings_sha256(path: str) -> str | None:
    """The digest of the configuration, the processor and the tokenizer. None: see `weights_sha256`."""
    folder = local_folder(path)
    return None if folder is None else files_sha256(folder / name for name in (*CONFIGS, *TOKENIZER))


def code_sha256(path: str, trust_remote_code: bool = False) -> str | None:
    """The digest of the code that runs: this project's, or the code beside a checkpoint. None: see `weights_sha256`."""
    if not trust_remote_code:
        return files_sha256(project_code())
    folder = local_folder(path)
    return None if folder is None else files_sha256(folder.glob("*.py"))


def project_code() -> set[Path]:
    """The modules of this project that a checkpoint needs beside its weights."""
    root = Path(modeling_zs3.__file__).parent
    return with_imports(root / f"{name}_zs3.py" for name in ("modeling", "pipeline", "processing"))


def with_imports(modules: Iterable[Path]) -> set[Path]:
    """The modules, and the modules beside them that they import."""
    return {file for module in modules for file in (module, *map(Path, get_relative_import_files(module)))}


def files_sha256(files: Iterable[Path]) -> str:
    lines = sorted(
        f"{file.name} {file_sha256(file)}\n" for file in files if file.is_file() and not is_leftover(file.name)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def local_folder(path: str) -> Path | None:
    """The folder of a checkpoint; of a Hub id, the folder of its download. None: it was not downloaded."""
    if Path(path).is_dir():
        return Path(path)
    cached = [try_to_load_from_cache(path, name) for name in (WEIGHTS, INDEX)]
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def check_no_unseen_masks(config: PreTrainedConfig, label_space: LabelSpace, claim: str) -> None:
    """The leak guard: refuses a checkpoint that was trained on unseen masks. claim: the refused claim, for messages."""
    if config.seen_class_names is None:
        raise NoClaim(f"the checkpoint does not say which classes its training masks show: no {claim}")
    leaked = shared(label_space.unseen, config.seen_class_names)
    if leaked:
        split = "; if it was trained with a class split, give its --label_space"
        raise NoClaim(f"the checkpoint was trained on masks of {shortened(leaked[0])}, unseen here: no {claim}{split}")
