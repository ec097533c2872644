"""The time to embed a long label list: padding to 77 or to the longest prompt, and the first call or later calls.

    python -m benchmarks.text_side --output docs/results/text_side.json

The labels are those of ADE20K-847. The encoder has the size of CLIP ViT-B/16's text tower (63 million parameters) and
random weights. The tokenizer makes one token from every word, digit and punctuation mark. With the first template a
prompt has 9.5 tokens on average; CLIP's tokenizer makes 9.9. `--tokenizer` loads CLIP's tokenizer from OpenAI's file.

Padding to 77 calls `encode_text` directly. All other calls use a TextCache in a new folder. Its first call embeds all
labels; later calls find the vectors. "weights hashed anew" is a later call as a new process would make it.

A second table compares caches of `--entries` labels, with random vectors in place of the text tower's. It shows whether
the time of a call depends on the number of entries. "new cache" has nothing in memory; the other cache has all entries.
Listing the folder does depend on it. A cache lists it once for FREE_SHARE of its bound in bytes written.
"""

import gzip
import itertools
import re
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, ResNetConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks import measuring
from configuration_zs3 import Zs3Config, one_line
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import PROMPT_TEMPLATES, Label, TextCache, label_keys, read_labels, text_side
from zs3.command_line import Count, InputError, Some, flag, read_arguments, run
from zs3.label_space import load_label_space
from zs3.scenes.captions import learn_merges

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY = 49408  # of CLIP's tokenizer; its last two tokens are START and END
WORD = r"[^\W\d_]+|\d|[^\w\s]+"  # a word, a digit, or punctuation marks
PADDED, FIRST = "all prompts padded to {}", "first call"
KNOWN = 10  # labels of a call that finds all of them
BOUND = 2**40  # bytes; no cache of the comparison reaches it
LISTING = "the folder is listed"


@dataclass
class TextArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    labels: Count = flag(847, "Number of labels, from the start of ADE20K-847.")
    templates: Count = flag(1, "Prompt templates for each label.")
    layers: Count = flag(12, "Layers of the text tower.")
    width: Count = flag(512, "Width of the text tower; its heads have 64 channels.")
    rounds: Count = flag(20, "Calls that find their vectors in memory or on disk; the time is their median.")
    entries: Some[Count] = flag([100, 10_000, 100_000], "Labels in the caches that are compared, the fewest first.")
    tokenizer: str | None = flag(None, f"Folder with OpenAI's {MERGES_FILE}; default: each word is one token.")


def clip_merges(folder: str) -> list[tuple[str, ...]]:
    """OpenAI's list of merges."""
    try:
        lines = gzip.decompress((Path(folder) / MERGES_FILE).read_bytes()).decode().splitlines()
    except OSError as error:
        why = error.strerror or one_line(error)
        raise InputError(f"--tokenizer {folder}: {MERGES_FILE} cannot be read there ({why})") from error
    return [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 * len(bytes_to_unicode()) - 1]]


def make_tokenizer(merges: list[tuple[str, ...]]) -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate(words)} | {START: VOCABULARY - 2, END: VOCABULARY - 1}
    length = CLIPTextConfig().max_position_embeddings
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def text_model(args: TextArgs) -> Zs3ForSemanticSegmentation:
    """A model with random weights. Its image part is as small as possible."""
    text = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    text |= {"num_attention_heads": max(1, args.width // 64), "vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1}
    layers = {"layer_type": "basic", "depths": [1] * 4, "hidden_sizes": [8] * 4, "embedding_size": 8}
    backbone = ResNetConfig(**layers, out_features=["stage1", "stage2", "stage3", "stage4"])
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    small |= {"encoder_feedforward_dim": 32, "num_queries": 1, "decoder_layers": 2, "encoder_layers": 1}
    config = Zs3Config(backbone_config=backbone.to_dict(), text_config=CLIPTextConfig(**text).to_dict(), **small)
    return Zs3ForSemanticSegmentation(config).eval()


def padded_ids(labels: list[Label], tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids (C, T, 77). Padding counts as text, so it is not cut. A causal encoder gives the same vectors."""
    prompts = [prompt for label in labels for prompt in label.prompts]
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return ids.reshape(len(labels), -1, ids.shape[1])


def compare(args: TextArgs, labels: list[Label], processor: Zs3Processor, folder: str) -> dict[str, float]:
    """The seconds of each way to get the same vectors."""
    torch.manual_seed(0)
    model = text_model(args)
    cache = TextCache(folder)
    model.encode_text(**processor.tokenize(labels[:1]))  # libraries do some work only in the first call
    seconds = {}
    name = PADDED.format(processor.tokenizer.model_max_length)
    seconds[name], expected = measuring.timed(lambda: model.encode_text(padded_ids(labels, processor.tokenizer)))
    seconds[FIRST], first = measuring.timed(lambda: cache.embed(labels, model, processor))
    measuring.check_close(float((first - expected).abs().max()), 1e-5, "the vectors of the two ways of padding")

    def in_new_process() -> Tensor:
        with patch("text_zs3._FINGERPRINTS", WeakKeyDictionary()):
            return TextCache(folder).embed(labels, model, processor)

    again = {
        "again, from memory": lambda: cache.embed(labels, model, processor),
        "again, from disk": lambda: TextCache(folder).embed(labels, model, processor),
        "again, from disk, weights hashed anew": in_new_process,
    }
    with patch.object(model, "encode_text", None):  # later calls must not need it
        for name, function in again.items():
            if not torch.equal(function(), first):
                raise InputError(f"{name}: not the vectors of the first call")
        for name, spent in measuring.take_turns(again, args.rounds).items():
            seconds[name] = statistics.median(spent)
    return seconds


def compare_sizes(args: TextArgs, processor: Zs3Processor, folder: str) -> dict[str, list[float]]:
    """The seconds of each kind of call, on caches with args.entries labels."""
    model, numbers, steps = text_model(replace(args, layers=1, width=64)), itertools.count(), {}
    listings = []
    side, size = text_side(model.text_model, processor.tokenizer), model.config.projection_dim

    def named(count: int) -> list[Label]:
        return [Label(name, (name,), ("{}",)) for name in (f"label {next(numbers)}" for _ in range(count))]

    def random_vectors(input_ids: Tensor, **_: Tensor) -> Tensor:
        return F.normalize(torch.randn(len(input_ids), size), dim=-1)

    def add_steps(entries: int) -> None:
        place, labels = f"{folder}/{entries}", named(entries)
        cache = TextCache(place, BOUND)
        names = [f"{side}/{key}" for key in label_keys(labels, processor.tokenizer)]
        cache._write({name: row.numpy().tobytes() for name, row in zip(names, random_vectors(names), strict=True)})
        known = labels[:: entries // KNOWN][:KNOWN]
        cache.embed(labels, model, processor)
        steps[f"{KNOWN} known labels, new cache", entries] = lambda: TextCache(place, BOUND).embed(
            known, model, processor
        )
        steps[f"{KNOWN} known labels", entries] = lambda: cache.embed(known, model, processor)
        steps["1 new label, new cache", entries] = lambda: TextCache(place, BOUND).embed(named(1), model, processor)
        steps["1 new label", entries] = lambda: cache.embed(named(1), model, processor)
        listings.append(measuring.seconds_of(cache._trim_folder))

    with patch.object(model, "encode_text", random_vectors):
        for entries in args.entries:
            add_steps(entries)
        spent = measuring.take_turns(steps, args.rounds)
    seconds = {}
    for (name, _), values in spent.items():
        seconds.setdefault(name, []).append(statistics.median(values))
    return seconds | {LISTING: listings}


def table_of_sizes(entries: list[int], seconds: dict[str, list[float]]) -> str:
    """Markdown. A cell has the time and its ratio to the time with the fewest entries."""
    head = ["text cache, milliseconds (ratio)", *(f"{number:,} entries" for number in entries)]
    rows = [[name, *(f"{1e3 * own:.2f} ({own / row[0]:.2f})" for own in row)] for name, row in seconds.items()]
    return measuring.table_of(head, rows)


def table(seconds: dict[str, float]) -> str:
    """Markdown."""
    padded, first = list(seconds.values())[:2]
    head = ["text vectors", "seconds", "times faster than padded", "times faster than the first call"]
    rows = [[name, f"{own:.4f}", f"{padded / own:,.1f}", f"{first / own:,.1f}"] for name, own in seconds.items()]
    return measuring.table_of(head, rows)


def main() -> None:
    args, _ = read_arguments(TextArgs)
    names = load_label_space("ade20k_847").class_names
    if args.labels > len(names) or args.templates > len(PROMPT_TEMPLATES):
        raise InputError(f"--labels is at most {len(names)}, and --templates is at most {len(PROMPT_TEMPLATES)}")
    if args.width >= 64 and args.width % (args.width // 64):
        raise InputError(f"--width must be a multiple of 64, got {args.width}")
    if args.entries[0] < KNOWN or args.entries != sorted(args.entries):
        raise InputError(f"--entries must be {KNOWN} or more, the fewest first, got {args.entries}")
    labels = read_labels(names[: args.labels], PROMPT_TEMPLATES[: args.templates])
    prompts = [prompt for label in labels for prompt in label.prompts]
    words = {word for prompt in prompts for word in re.findall(WORD, prompt.lower())}
    tokenizer = make_tokenizer(learn_merges(words) if args.tokenizer is None else clip_merges(args.tokenizer))
    lengths = [len(ids) for ids in tokenizer(prompts, truncation=True)["input_ids"]]
    processor = Zs3Processor(Zs3ImageProcessor(), tokenizer, PROMPT_TEMPLATES[: args.templates])
    with tempfile.TemporaryDirectory() as folder:
        seconds = compare(args, labels, processor, folder)
        of_sizes = compare_sizes(args, processor, f"{folder}/sizes")
    kind = "one token a word" if args.tokenizer is None else "CLIP's own"
    head, lengths = measuring.head(), {"mean_tokens": statistics.mean(lengths), "longest": max(lengths)}
    text = f"{len(labels)} labels, {len(prompts)} prompts of {lengths['mean_tokens']:.1f} tokens (longest "
    text += f"{lengths['longest']}; {kind}), text tower of {args.layers} layers, width {args.width}, "
    text += f"torch {head['torch']}, {head['machine']}.\n\n{table(seconds)}\n{table_of_sizes(args.entries, of_sizes)}"
    result = {**head, **vars(args), "tokenizer": kind, **lengths, "seconds": seconds, "seconds_of_sizes": of_sizes}
    measuring.publish(args.output, result, text)


if __name__ == "__main__":
    run(main)
