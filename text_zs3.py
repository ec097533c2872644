"""Label lists: read, turned into text vectors, kept in memory and on disk, and checked before they are used.

read_labels: a label list as users write it -> Labels. embed_labels: Labels -> text vectors (C, D).
TextCache: keeps text vectors; a label is embedded once, whatever list it comes in.
lint_labels: a label list -> LabelReport: repeats, near-synonyms, names that are too long, seen and unseen names.

Axes: C class name, D embedding.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

try:
    from .configuration_zs3 import Refused, among, as_number, check_name, check_names, plain, shortened
    from .encoders_zs3 import PROMPT_TEMPLATES, family_of, text_vectors, vector_size
    from .files_zs3 import PARTIAL, whole
    from .outputs_zs3 import has_no_values
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Refused, among, as_number, check_name, check_names, plain, shortened
    from encoders_zs3 import PROMPT_TEMPLATES, family_of, text_vectors, vector_size
    from files_zs3 import PARTIAL, whole
    from outputs_zs3 import has_no_values

logger = logging.get_logger(__name__)

ClassName = str | Sequence[str] | dict

PROMPTS_AT_ONCE = 256  # in the text tower
FORMAT = "2"  # a new number is needed when encode_text or the files change their meaning
DEFAULT_FOLDER = "{HF_HOME}/zs3/text_embeds"
DIGEST_BYTES = 32  # of SHA-256
FREE_SHARE = 1 / 16  # part of max_bytes: after so many written bytes the folder is listed and trimmed
# The only files that TextCache may remove from its folder. In format 1 they ended in .safetensors or .<hex>.partial.
OWN_FILE = re.compile(rf"[0-9a-f]{{64}}/([0-9a-f]{{64}}\.(vector|safetensors|[0-9a-f]{{32}}\.partial)|{PARTIAL})")

# Cosine from which lint_labels calls two names near-synonyms. Measured with OpenAI's CLIP: of all pairs of names in
# COCO-Stuff, LVIS, Objects365 and OpenImages, 0.1 % lie above 0.90 to 0.94 (the 14 templates add 0.03). Cat and dog
# have 0.92 to 0.94. Of 63 pairs that LVIS lists as synonyms, half lie below 0.92, a quarter above 0.94 (sofa and couch,
# 0.946). No cosine separates synonyms from others. This one is the lowest that does not report cat and dog.
SIMILAR = 0.94
MOST_PAIRS = 1000  # of near-synonyms in a report
COSINES_AT_ONCE = 2**22
LINES = 10  # of each kind in a printed report


# ------------------------------------------------------------------------------------------------ labels


class Label(NamedTuple):
    """One entry of a label list: its name, its words (the name and its synonyms), and their prompt templates."""

    name: str
    words: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, word by word. The mean of their vectors is the label's vector."""
        return tuple(template.replace("{}", word) for word in self.words for template in self.templates)

    def synonyms(self) -> list["Label"]:
        """A label for each word."""
        return [Label(word, (word,), self.templates) for word in self.words]


def read_labels(
    class_names: Sequence[ClassName], templates: Sequence[str] = PROMPT_TEMPLATES, allow_repeats: bool = False
) -> list[Label]:
    """A label list as users write it. An entry is a name, a list of synonyms (the first is the name), or a dict with
    `name`, and optionally `synonyms` and `templates`. Equal names (see `plain`) raise, unless allow_repeats."""
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise ValueError(f"class names must be a list, got {shortened(class_names)}")
    if not class_names:
        raise ValueError("the list of class names is empty")
    labels = [_read_label(entry, templates) for entry in class_names]
    if not allow_repeats:
        check_names([label.name for label in labels])
    return labels


def _read_label(entry: ClassName, templates: Sequence[str]) -> Label:
    if isinstance(entry, dict):
        unknown = sorted(map(str, set(entry) - {"name", "synonyms", "templates"}))
        if unknown or "name" not in entry:
            raise ValueError(
                f"a label needs a name, and may have synonyms and templates, got {shortened(sorted(map(str, entry)))}"
            )
        templates = _as_list(entry.get("templates") or templates)
        entry = [entry["name"], *_as_list(entry.get("synonyms") or [])]
    words = _as_list(entry)
    words = [word.strip() if isinstance(word, str) else word for word in words]
    if not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"a label must be a name, a list of synonyms or a dict, got {shortened(entry)}")
    for word in words:
        check_name(word)
    wrong = [template for template in templates if not isinstance(template, str) or "{}" not in template]
    if wrong:
        raise ValueError(f"a prompt template needs '{{}}' where the name goes, got {shortened(wrong[0])}")
    return Label(words[0], tuple(words), tuple(templates))


def _as_list(value: str | Sequence[str]) -> list[str]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def seen_labels(labels: Sequence[Label], seen_class_names: Sequence[str] | None) -> list[bool]:
    """Whether the training saw masks of each label: one of its words is a seen class name."""
    words = [(row, word) for row, label in enumerate(labels) for word in label.words]
    is_seen = among([word for _, word in words], seen_class_names)
    rows = {row for (row, _), seen in zip(words, is_seen, strict=True) if seen}
    return [row in rows for row in range(len(labels))]


# ----------------------------------------------------------------------------------------------------- text vectors


def embed_labels(
    labels: Sequence[Label],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cache: "TextCache | None" = None,
    *,
    apart: bool = False,
) -> Tensor:
    """Labels to text vectors: (C, D) float32, unit length, on the model's device. The only way of names to vectors.

    cache: it keeps the vectors, and gives those that it knows. None: the text tower embeds all labels now.
    apart: a vector for each word of a label, label after label, instead of one for all its words.
    """
    rows = [word for label in labels for word in label.synonyms()] if apart else labels
    if cache is None:
        processor.check_readable(labels)
        return model.encode_text(**processor.tokenize(rows))
    cache.check_readable(labels, processor)
    return cache.embed(rows, model, processor)


def embed_prompts(text_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(C, L), or (C, T, L) for T prompts a class -> (C, D), the sum of the unit vectors of each class's prompts.

    A prompt whose mask is zero everywhere does not exist.
    """
    if input_ids.dim() == 2:
        input_ids, attention_mask = input_ids[:, None], attention_mask[:, None]
    exists = attention_mask.any(-1)  # (C, T)
    if not exists.any(-1).all():
        raise ValueError("a class has no prompt: its attention_mask is zero everywhere")
    ids, mask = input_ids[exists], attention_mask[exists]  # (all prompts, L)
    lengths = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(-1)
    prompts = ids.new_zeros(len(ids), vector_size(text_model.config), dtype=torch.float32)
    with torch.autocast(ids.device.type, enabled=False):  # once for a label list: exact rather than fast
        for rows in lengths.argsort(stable=True).split(PROMPTS_AT_ONCE):  # of like lengths, so hardly any padding
            longest = int(lengths[rows[-1]])
            vectors = text_vectors(text_model, ids[rows, :longest], mask[rows, :longest])
            prompts[rows] = vectors.float().to(prompts.device)
    embeds = prompts.new_zeros(*exists.shape, prompts.shape[-1])
    embeds[exists] = F.normalize(prompts, dim=-1)  # (C, T, D)
    return embeds.sum(1)


def check_text_embeds(text_embeds: Tensor, size: int) -> None:
    """Raises Refused where text vectors are not (C, size) floating-point numbers, or where one has no direction: it is
    zero, or holds NaN or infinities."""
    if not isinstance(text_embeds, Tensor) or not text_embeds.is_floating_point():
        kind = text_embeds.dtype if isinstance(text_embeds, Tensor) else type(text_embeds).__name__
        raise Refused(f"text vectors must be a tensor of floating-point numbers, got {kind}")
    if text_embeds.dim() != 2 or len(text_embeds) == 0 or text_embeds.shape[1] != size:
        raise Refused(f"text vectors must be (C, {size}), got {tuple(text_embeds.shape)}")
    lengths = F.normalize(text_embeds.float(), dim=-1).norm(dim=-1)
    if has_no_values(lengths):
        return
    lost = (~((lengths - 1).abs() < 0.01)).nonzero()[:, 0]  # with "not", since a comparison with NaN is False
    if len(lost):
        raise Refused(
            f"{len(lost)} of {len(lengths)} text vectors have no direction, row {int(lost[0])} first: zero, too large "
            "or not finite; make them again"
        )


class TextCache:
    """Text vectors of labels, in memory and in a folder that several processes may share.

    The key of a label is everything that its vector depends on: the encoder's weights, the tokenizer, its words as the
    tokenizer normalises them, and its templates. So no vector ever becomes wrong. A file is found by its name, so the
    time of a call does not depend on the number of entries.

    folder: holds <text side>/<hash of the label>.vector, one file for each label. "{HF_HOME}" in it is Hugging Face's
        home at the time when the cache is made. None: memory only. Where the folder cannot be written, there is one
        warning, and the cache works in memory. A damaged file is removed, with a warning, and its label is embedded
        again.
    max_bytes: of all vectors in memory, and of the content of the files of all encoders; a disk gives a file at least a
        block, often 4 KB. What was not used for the longest time is removed first. The folder is listed, and trimmed to
        max_bytes, only after FREE_SHARE of max_bytes was written to it. So it may exceed max_bytes by so much for each
        process that writes. The count of written bytes starts at a random value: otherwise processes that write little
        would never trim. A file was used when it was last written or read.

    Threads take turns.
    """

    def __init__(self, folder: str | Path | None = DEFAULT_FOLDER, max_bytes: int = 256 * 2**20):
        self.folder = None if folder is None else Path(str(folder).replace("{HF_HOME}", constants.HF_HOME))
        self.max_bytes = max_bytes
        self._vectors: dict[str, bytes] = {}  # by name; first those unused for the longest time
        self._held = 0  # bytes in memory
        self._written = self._random_part()  # bytes since the folder was last listed
        self._writable = True
        self._readable: tuple[str, tuple[Label, ...]] | None = None  # the last list that `check_readable` passed
        self._lock = threading.RLock()

    def _random_part(self) -> float:
        return SystemRandom().random() * FREE_SHARE * self.max_bytes

    def __getstate__(self) -> dict:
        """For copies and other processes, without the lock: each has its own."""
        with self._lock:
            return {**vars(self), "_vectors": dict(self._vectors), "_lock": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.RLock())
        self._written = self._random_part()

    def check_readable(self, labels: Sequence[Label], processor: ProcessorMixin) -> None:
        """The processor's own check. A list that passed it last is not checked again."""
        checked = tokenizer_fingerprint(processor.tokenizer), tuple(labels)  # a copy: the caller may change the list
        if checked != self._readable:
            processor.check_readable(labels)
            self._readable = checked

    def embed(self, labels: Sequence[Label], model: PreTrainedModel, processor: ProcessorMixin) -> Tensor:
        """(C, D) float32, unit length, on the model's device. Unknown labels are embedded in one call."""
        if model.text_model is None:
            raise ValueError("this checkpoint has no text tower: label lists cannot be embedded")
        if any(weight.is_meta for weight in model.text_model.parameters()):  # offloaded: no fingerprint
            return model.encode_text(**processor.tokenize(labels))
        with self._lock:
            return self._embed(labels, model, processor)

    def _embed(self, labels: Sequence[Label], model: PreTrainedModel, processor: ProcessorMixin) -> Tensor:
        side, size = text_side(model.text_model, processor.tokenizer), vector_size(model.text_model.config)
        names = [f"{side}/{key}" for key in label_keys(labels, processor.tokenizer)]
        found = self._recall(names, size)
        missing = {name: label for name, label in zip(names, labels, strict=True) if name not in found}
        if missing:
            vectors = model.encode_text(**processor.tokenize(list(missing.values()))).numpy(force=True)
            made = {name: vector.tobytes() for name, vector in zip(missing, vectors, strict=True)}
            found.update(made)
            self._write(made)
        self._keep(found)
        vectors = bytearray().join(found[name] for name in names)
        return torch.frombuffer(vectors, dtype=torch.float32).reshape(len(names), size).to(model.device)

    def _recall(self, names: Sequence[str], size: int) -> dict[str, bytes]:
        """Name -> its vector of `size` numbers, for the names that memory or the folder has. Removes damaged files."""
        found, damaged = {}, []
        for name in dict.fromkeys(names):
            vector = self._vectors.get(name)
            content = self._read(name, size) if vector is None else None
            if content is not None:
                vector = _vector_in(content, name, size)
                if vector is None:
                    damaged.append(self._path(name))
            if vector is not None:
                found[name] = vector
        if damaged:
            more = f", and so are {len(damaged) - 1:,} more" if damaged[1:] else ""
            logger.warning(f"{damaged[0]} is damaged{more}: computed again")
        for path in damaged:
            with suppress(OSError):  # removed by another process, or a folder that can only be read
                os.unlink(path)
        return found

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.vector"

    def _read(self, name: str, size: int) -> bytes | None:
        """A file's content; the file counts as used now. None: it is not there, or cannot be read. One byte more than
        a vector of `size` numbers is read, so that a longer file is found to be damaged."""
        if self.folder is None:
            return None
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                content = file.read(DIGEST_BYTES + 4 * size + 1)
        except OSError:
            return None
        with suppress(OSError):  # removed by another process, or a folder that can only be read
            os.utime(self._path(name))
        return content

    def _keep(self, vectors: dict[str, bytes]) -> None:
        """Marks vectors as used now, in memory."""
        for name, vector in vectors.items():
            self._held += len(vector) - len(self._vectors.pop(name, b""))
            self._vectors[name] = vector
        while self._held > self.max_bytes:
            self._held -= len(self._vectors.pop(next(iter(self._vectors))))

    def _write(self, vectors: dict[str, bytes]) -> None:
        """Writes a file for each vector; trims the folder where it is time to."""
        if self.folder is None or not self._writable:
            return
        try:
            for name, vector in vectors.items():
                with whole(Path(self._path(name)), synced=False) as partial:  # a damaged file is recognised
                    partial.write_bytes(_file_of(name, vector))
                self._written += DIGEST_BYTES + len(vector)
                if self._written >= FREE_SHARE * self.max_bytes:
                    self._trim_folder()
        except OSError as error:
            self._writable = False
            logger.warning(f"text vectors are kept in memory only: {self.folder} cannot be written ({error})")

    def _trim_folder(self) -> None:
        files = self._own_files()
        held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if held <= self.max_bytes:
                break
            with suppress(FileNotFoundError, PermissionError):  # another process was faster; somebody else's file
                os.unlink(path)
                held -= size
        self._written = 0

    def _own_files(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, bytes, path) of the cache's own files, first those unused for the longest time."""
        files = []
        for side in filter(os.DirEntry.is_dir, os.scandir(self.folder)):
            with suppress(PermissionError):  # somebody else's folder
                for file in os.scandir(side.path):
                    if OWN_FILE.fullmatch(f"{side.name}/{file.name}"):
                        with suppress(FileNotFoundError):  # another process was faster
                            facts = file.stat()
                            files.append((facts.st_mtime_ns, facts.st_size, file.path))
        return sorted(files)


def _file_of(name: str, vector: bytes) -> bytes:
    """The content of a file: SHA-256 of its name and its vector, then the vector, float32."""
    return hashlib.sha256(name.encode() + vector).digest() + vector


def _vector_in(content: bytes, name: str, size: int) -> bytes | None:
    """The vector of `size` numbers in a file's content; None: damaged, another name or size, or not of unit length."""
    vector = content[DIGEST_BYTES:]
    if content != _file_of(name, vector) or len(vector) != 4 * size:
        return None
    values = np.frombuffer(vector, np.float32).astype(np.float64)
    return vector if abs(values.dot(values) - 1) < 0.001 else None  # NaN: None


# ----------------------------------------------------------------------------------------------------- fingerprints

_FINGERPRINTS: WeakKeyDictionary[object, tuple[tuple, str]] = WeakKeyDictionary()  # of text towers and tokenizers


def text_side(text_model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the encoder and the tokenizer, on which all vectors depend."""
    parts = [FORMAT, encoder_fingerprint(text_model), tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def encoder_fingerprint(text_model: nn.Module) -> str:
    """SHA-256 of the tower's weights, of its family, and of the fields of its configuration that change its vectors.

    Computed again where a weight was replaced or changed in place. A change through `.data` leaves no trace but the
    values themselves: it is noticed where it changes the first value of a weight.
    """
    weights = dict([*text_model.named_parameters(), *text_model.named_buffers()])
    family = family_of(text_model.config)
    fields = [family.title, *(str(getattr(text_model.config, name, None)) for name in family.text_fields)]
    if any(weight.is_inference() for weight in weights.values()):  # changes of these are not counted
        return _encoder_hash(weights, fields)
    traces = [
        (name, id(weight), weight._version, weight.data_ptr(), weight.detach()[(0,) * weight.dim()].item())
        for name, weight in weights.items()
    ]
    return _remembered(text_model, (fields, traces), lambda: _encoder_hash(weights, fields))


def _encoder_hash(weights: dict[str, Tensor], fields: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(fields).encode())
    for name, weight in weights.items():
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokenizer's definition, and of the way it cuts and pads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = [len(tokenizer), tokenizer.model_max_length, tokenizer.truncation_side, tokenizer.padding_side]
    state += [repr(getattr(backend, part, None)) for part in ("normalizer", "pre_tokenizer", "post_processor")]

    def compute() -> str:
        if backend is None:
            definition = repr([type(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs])
        else:  # the part before "added_tokens" changes with each call that cuts or pads
            definition = backend.to_str().split('"added_tokens"', 1)[-1]
        return hashlib.sha256(json.dumps([state, definition]).encode()).hexdigest()

    return _remembered(tokenizer, tuple(state), compute)


def _remembered(thing: object, stamp: tuple, compute: Callable[[], str]) -> str:
    """The fingerprint of a thing, computed again where its stamp has changed."""
    known = _FINGERPRINTS.get(thing)
    if known is None or known[0] != stamp:
        known = _FINGERPRINTS[thing] = (stamp, compute())
    return known[1]


def label_keys(labels: Sequence[Label], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """SHA-256 of each label: of its words, as the tokenizer normalises them, and of its templates."""
    normalise = normaliser(tokenizer)
    texts = [json.dumps([[normalise(word) for word in label.words], label.templates]) for label in labels]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def normaliser(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], str]:
    """The tokenizer's normalisation of a text, such as lower case."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return str
    return backend.normalizer.normalize_str


# ------------------------------------------------------------------------------------------------------ label lists


class SimilarNames(NamedTuple):
    """Two labels, `first` before `second` in the list, and the cosine of their text vectors."""

    first: str
    second: str
    cosine: float


@dataclass
class LabelReport:
    """The result of `lint_labels`; print its `str` in a terminal.

    class_names: the names in the order given.
    duplicates: word, normalised, that is in the list more than once -> positions of its labels.
    near_synonyms: pairs with a cosine of `similar` or more, the closest first, at most MOST_PAIRS; None: no text tower.
    too_long: name -> tokens of its longest prompt, where it has more than max_tokens; None: no tokenizer.
    seen, unseen: names with and without a word whose masks the training saw; None: not known.
    """

    class_names: list[str]
    duplicates: dict[str, list[int]]
    similar: float
    near_synonyms: list[SimilarNames] | None = None
    max_tokens: int | None = None
    too_long: dict[str, int] | None = None
    seen: list[str] | None = None
    unseen: list[str] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.class_names)} labels"]
        repeats = [f"{word!r}: {self._labels(places)}" for word, places in self.duplicates.items()]
        lines += _section("words that repeat", repeats)
        pairs = self.near_synonyms
        if pairs is not None:
            pairs = [f"{pair.cosine:.3f}  {pair.first!r}, {pair.second!r}" for pair in pairs]
        lines += _section(f"near-synonyms, cosine {self.similar:g} or more", pairs)
        long = self.too_long
        if long is not None:
            long = [f"{tokens} tokens, {self.max_tokens} are read: {name!r}" for name, tokens in long.items()]
        lines += _section("too long", long)
        lines += _section("not seen in training", None if self.unseen is None else [repr(n) for n in self.unseen])
        return "\n".join(lines)

    def _labels(self, places: list[int]) -> str:
        return ", ".join(f"label {place} {self.class_names[place]!r}" for place in places[:LINES])


def _section(title: str, rows: list[str] | None) -> list[str]:
    if rows is None:
        return [f"{title}: not known"]
    more = [f"  and {len(rows) - LINES:,} more"] if len(rows) > LINES else []
    return [f"{title}: {len(rows):,}", *(f"  {row}" for row in rows[:LINES]), *more]


def lint_labels(
    class_names: Sequence[ClassName],
    *,
    model: PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    cache: TextCache | None = None,
    similar: float = SIMILAR,
) -> LabelReport:
    """Facts about a label list that a user should know before segmenting with it. None of them is an error.

    class_names: as for `read_labels`, but names may repeat.
    model, processor: without both, only words are compared. A processor alone counts tokens; a model without a text
        tower says which names are seen.
    cache: of the text vectors; None: a TextCache in its default folder.
    similar: cosine from which two labels are near-synonyms. Labels with the same words are not compared, nor those that
        are too long.
    """
    similar = as_number("similar", similar, -1, 1)
    tokenizer = None if processor is None else processor.tokenizer
    templates = PROMPT_TEMPLATES if processor is None else processor.prompt_templates
    labels = read_labels(class_names, templates, allow_repeats=True)
    normalise = normaliser(tokenizer)
    words = [tuple(plain(normalise(word)) for word in label.words) for label in labels]
    report = LabelReport([label.name for label in labels], _duplicates(words), similar)
    if model is not None and model.config.seen_class_names is not None:
        is_seen = seen_labels(labels, model.config.seen_class_names)
        report.seen = [label.name for label, seen in zip(labels, is_seen, strict=True) if seen]
        report.unseen = [label.name for label, seen in zip(labels, is_seen, strict=True) if not seen]
    if tokenizer is None:
        return report
    text_model = None if model is None else model.text_model
    limit = tokenizer.model_max_length
    if text_model is not None:
        limit = min(limit, text_model.config.max_position_embeddings)
    tokens = processor.token_counts(labels)
    report.max_tokens = limit
    report.too_long = {label.name: count for label, count in zip(labels, tokens, strict=True) if count > limit}
    if text_model is not None:
        fitting = {}
        for label, of_label, count in zip(labels, words, tokens, strict=True):
            if count <= limit:
                fitting.setdefault(of_label, label)
        cache = TextCache() if cache is None else cache
        kept = list(fitting.values())
        report.near_synonyms = near_synonyms(kept, cache.embed(kept, model, processor), similar) if kept else []
    return report


def _duplicates(words: list[tuple[str, ...]]) -> dict[str, list[int]]:
    """Words that are in the list more than once -> positions of their labels."""
    places = {}
    for row, of_label in enumerate(words):
        for word in of_label:
            places.setdefault(word, []).append(row)
    return {word: rows for word, rows in places.items() if len(rows) > 1}


def near_synonyms(labels: Sequence[Label], text_embeds: Tensor, similar: float) -> list[SimilarNames]:
    """The closest MOST_PAIRS of all pairs with a cosine of `similar` or more; text_embeds (C, D), unit length.

    Never more than COSINES_AT_ONCE of the C x C cosines are in memory.
    """
    found = []
    rows_at_once = max(1, COSINES_AT_ONCE // len(labels))
    for start in range(0, len(labels), rows_at_once):
        cosines = (text_embeds[start : start + rows_at_once] @ text_embeds[start:].T).clamp(max=1)
        pairs = (cosines >= similar).triu(1).nonzero()  # each pair once, none with itself
        best = cosines[pairs[:, 0], pairs[:, 1]].topk(min(MOST_PAIRS, len(pairs)))
        pairs = (start + pairs[best.indices]).tolist()
        found += [(-cosine, first, second) for cosine, (first, second) in zip(best.values.tolist(), pairs, strict=True)]
        found = sorted(found)[:MOST_PAIRS]
    return [SimilarNames(labels[first].name, labels[second].name, -minus) for minus, first, second in found]
