"""The captions of the world of `zs3.scenes`, and tokenizers with one token for each word of them."""

import re
from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer

from text_zs3 import PROMPT_TEMPLATES
from zs3.scenes import render

# The bare name is no caption, nor is a name with an article: as on the web, captions are sentences.
CAPTIONS = [
    *PROMPT_TEMPLATES, "a picture of a {}.", "an image of a {}.", "a close-up of a {}.", "a cropped photo of a {}.",
    "a drawing of a {}.", "a photo of the {}.", "a photo of one {}.", "a {} on a plain background",
    "a photo of a {}, partly hidden", "a bright photo of a {}.", "a dark photo of a {}.", "a sculpture of a {}.",
    "there is a {}", "look at this {}!",
]  # fmt: skip
WORD_END = "</w>"  # CLIP's mark of the last piece of a word
WORD_START = "▁"  # SentencePiece's mark of the first piece


def _words() -> set[str]:
    return set(re.findall("[a-z]+", " ".join([*render.WORLD_NAMES, *CAPTIONS]).lower()))


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte pair merges until each lower-case ASCII word is one token. Equal counts: the last pair in the alphabet."""
    return _merges([[*word[:-1], word[-1] + WORD_END] for word in sorted(words)])


def _merges(pieces: list[list[str]]) -> list[tuple[str, str]]:
    merges = []
    while any(len(word) > 1 for word in pieces):
        count = Counter(pair for word in pieces for pair in pairwise(word))
        first, second = merge = max(count, key=lambda pair: (count[pair], pair))
        merges.append(merge)
        for word in pieces:
            for position in range(len(word) - 1, 0, -1):
                if word[position - 1 : position + 1] == [first, second]:
                    word[position - 1 : position + 1] = [first + second]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer, with one token for each word of the captions and bytes for all other text."""
    merges = learn_merges(_words())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *dict.fromkeys(a + b for a, b in merges)]
    # End of text has the last id, as in CLIP, so that both ways of pooling in transformers agree.
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def tipsv2_tokenizer() -> Tipsv2Tokenizer:
    """TIPSv2's tokenizer, with one token for each word of the captions, and bytes for all other text."""
    merges = _merges([[WORD_START, *word] for word in sorted(_words())])
    letters = [WORD_START, *map(chr, range(33, 127))]
    tokens = ["<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: number for number, token in enumerate([*tokens, *dict.fromkeys(a + b for a, b in merges)])}
    return Tipsv2Tokenizer(vocab=vocabulary, merges=merges)
