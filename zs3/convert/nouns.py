"""Caption nouns (section 4.5): nouns of captions become additional class names and image labels.

    pip install -c constraints.txt -e '.[nouns]'
    zs3 nouns --captions data/coco_captions --label_space coco_stuff_171 --output runs/nouns

The folder gets `classes.json`, the class names: the seen names in the order of the label space, then the most
frequent other nouns; `nouns-train.parquet`, the indices of these names for each image_id; and `settings.json`. The
frequency of a name is the number of images that have it in a caption.

Rules to find a name in a caption (Reading: the paper gives neither a tagger nor a rule):
- Words are compared in lower case, by their lemma, without spaces and hyphens. So "skis" equals "ski", "cell phones"
  equals "cellphone", "playing field" equals "playingfield".
- A name of several words always counts. A name of one word counts only as a noun: "train", not "is trained". The
  longest name takes its words: in "hot dog" there is no "dog", in "traffic light" no "light".
- "-other" and "-stuff" are dropped: "door-stuff" is "door", "wall-other" is "wall". Any other hyphen joins two words in
  either order: "wall-brick" is "wall brick" or "brick wall".
- Commas separate synonyms.
The same rules find unseen names, which by default never become class names. But "wall" and "concrete" are not
"wall-concrete", and synonyms of an unseen name ("cattle", "street") stay.

The tagger is HanTa, an extra because its license is LGPL; its model is part of the package. LemmInflect gives the
lemmas. On 100 captions like COCO's with marked nouns (tests/test_nouns.py) HanTa has precision and recall 0.99; on the
30 captions written after the choice, 0.98; TextBlob's tagger has 0.94 and 0.94. HanTa reads about 1,600 captions a
second on one core: the 591,753 training captions of COCO take 6 minutes.

Axes: C class name, N image.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from configuration_zs3 import among, one_line, plain
from files_zs3 import ignored_id
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFolder,
    Some,
    Workers,
    check_required,
    flag,
    read_arguments,
)
from zs3.data.records import dataset_name
from zs3.data.tables import table_shards
from zs3.files import write_json, writing_folder
from zs3.label_space import LabelSpace, load_label_space

IMAGES_AT_ONCE = 32  # in a batch of a loading process
PACKAGES = ("HanTa", "lemminflect")


@dataclass
class NounArgs(Arguments):
    """Takes nouns of captions as class names besides the seen names."""

    captions: str | None = flag(None, "Folder with data/{split}-*.parquet: image_id and captions, a list of strings.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; its seen names come first.")
    output: OutputFolder | None = flag(None, "Folder for the result; it must not exist yet.")
    splits: Some[str] = flag(["train"], "Splits of the captions to read.")
    num_words: Count = flag(1047, "Total number of class names, with the seen names.")
    exclude_unseen: bool = flag(True, "Leave out nouns that equal an unseen name.")
    num_workers: Workers = flag(0, "Processes that read captions; 0 reads in the main one.")

    def check(self) -> None:
        check_required(self, "captions", "label_space", "output")
        repeated = [split for split, times in Counter(self.splits).items() if times > 1]
        if repeated:
            raise InputError(f"--splits must name each split once, got {' '.join(self.splits)}")


# ---- words of a caption ------------------------------------------------------------------------------------


class Word(NamedTuple):
    text: str  # lower-cased
    noun: str | None  # its form in a list of names; None if it is no noun


# Words begin with a letter: numbers name nothing. Endings such as "'s" and punctuation are words of their own.
WORDS = re.compile(r"['’]\w+|[^\W\d_]+(?:-[^\W\d_]+)*|[.,;:!?]")
LEMMAS = {"leaves": "leaf"}  # LemmInflect's first choice is "leave"
SINGULAR_TAGS = {"NN0", "NN1"}
# A proper noun (NP0) or an unclassified word (UNC) in lower case is a rare noun, of either number.
NOUN_TAGS = {*SINGULAR_TAGS, "NN2", "NP0", "UNC"}
UNKNOWN_TO_HANTA = {"moped", "ostrich", "ottoman", "remote", "sled", "tangerine"}  # nouns that HanTa does not know
PLURAL_NOUNS = {"fries", "glasses", "pants", "shorts", "sunglasses"}  # the singular means another thing


@cache
def load_tagger() -> Callable[[str], list[Word]]:
    """A function from a caption to its words and punctuation, in order."""
    try:
        import HanTa
        import lemminflect  # noqa: F401
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        mend = "pip install -c constraints.txt -e '.[nouns]'"
        raise InputError(f"caption nouns need the package {error.name}: {mend}") from error
    hanta = HanoverTagger(str(Path(HanTa.__file__).parent / "morphmodel_en.pgz"))

    def tagger(caption: str) -> list[Word]:
        texts = WORDS.findall(normalize("NFC", caption).lower())
        tags = hanta.tag_sent(texts, taglevel=0) if texts else []
        return [Word(text, _listed(text, tag)) for text, tag in zip(texts, tags, strict=True)]

    return tagger


def _listed(text: str, tag: str) -> str | None:
    """A noun in its form for lists; None for other words. tag: of HanTa, a tag of the BNC."""
    if text in UNKNOWN_TO_HANTA or text in PLURAL_NOUNS and tag in NOUN_TAGS:
        return text
    if tag not in NOUN_TAGS or len(text) == 1 or not text[0].isalpha():
        return None
    return text if tag in SINGULAR_TAGS else noun_lemma(text)


@cache
def noun_lemma(word: str) -> str:
    """The singular of a lower-case noun."""
    from lemminflect import getLemma

    return LEMMAS.get(word) or getLemma(word, "NOUN")[0]


# ---- names in a caption ------------------------------------------------------------------------------------


def spellings(name: str) -> list[str]:
    """The spellings of a class name in captions, by the rules above; never empty."""
    found = []
    for synonym in normalize("NFC", name).lower().split(","):
        first, hyphen, last = synonym.strip().partition("-")
        if last in ("other", "stuff"):
            found.append(first)
        else:
            found.append(first + hyphen + last)
            if hyphen and " " not in synonym.strip():
                found.append(f"{last} {first}")
    return found


class NameFinder:
    """Finds class names and other nouns in tagged captions."""

    def __init__(self, class_names: Sequence[str]):
        self.names = {}  # spelling without spaces and hyphens -> name
        self.longest = 2  # words in the longest name; at least 2, because "cell phone" may be "cellphone"
        plain_first = sorted(class_names, key=lambda name: "-" in name)
        for form in (str, noun_lemma):  # exact words come first: "clothes" is not the plural of "cloth"
            for name in plain_first:
                for spelling in spellings(name):
                    words = WORDS.findall(spelling)
                    self.names.setdefault(_solid(map(form, words)) or name, name)
                    self.longest = max(self.longest, len(words))

    def __call__(self, words: list[Word]) -> set[str]:
        """The class names, in the spelling of the label space, and other nouns in the caption."""
        found, start = set(), 0
        while start < len(words):
            length, name = self._at(words[start : start + self.longest])
            if name is not None:
                found.add(name)
            start += length
        return found

    def _at(self, words: list[Word]) -> tuple[int, str | None]:
        """The length in words and the longest name at the start; if there is none, the first word if it is a noun."""
        for length in range(len(words), 0, -1):
            part = [word.text for word in words[:length]]
            name = self.names.get(_solid(part)) or self.names.get(_solid(map(noun_lemma, part)))
            if name is not None and (length > 1 or words[0].noun is not None):
                return length, name
        return 1, None if words[0].noun is None else plain(words[0].noun)


def _solid(words: Iterable[str]) -> str:
    return "".join(words).replace("-", "")


class CaptionWords(Dataset):
    """Of each image: the class names and nouns in its captions, in alphabetical order."""

    def __init__(self, captions: list[list[str]], class_names: list[str]):
        self.captions = captions
        self.find = NameFinder(class_names)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> list[str]:
        tagger = load_tagger()
        return sorted(set().union(*(self.find(tagger(caption)) for caption in self.captions[index])))


# ---- files -------------------------------------------------------------------------------------------------


def read_captions(folder: Path, split: str) -> dict[str, list[str]]:
    """image_id -> its captions, in the order of the files."""
    import pyarrow
    import pyarrow.parquet

    captions = {}
    for file in table_shards(folder, split):
        try:
            rows = pyarrow.parquet.read_table(file).to_pydict()
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"cannot read {file} ({one_line(error, 80)}): copy it anew") from error
        missing = [name for name in ("image_id", "captions") if name not in rows]
        if missing:
            raise InputError(f"{file} has no column {missing[0]!r}: it needs image_id and captions")
        for image_id, texts in zip(rows["image_id"], rows["captions"], strict=True):
            if not isinstance(image_id, str):
                raise InputError(f"{file}: an image_id is a string, not {image_id!r}")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{file}: captions are a list of strings, not {texts!r} (image {image_id!r})")
            if not any(text.strip() for text in texts):
                raise InputError(f"{file}: image {image_id!r} has no caption: leave it out")
            if image_id in captions:
                raise InputError(f"{file}: image {image_id!r} was there before: give it one row with all its captions")
            captions[image_id] = [text for text in texts if text.strip()]
    if not captions:
        raise InputError(f"{folder} has no image in split {split!r}: its tables are empty")
    return captions


def write_nouns(path: Path, image_ids: list[str], positions: list[np.ndarray]) -> None:
    """positions: N arrays, in the order of image_ids."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(positions, pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"image_id": image_ids, "nouns": column}), path)


# ---- the command -------------------------------------------------------------------------------------------


def chosen_words(frequency: Counter[str], label_space: LabelSpace, num_words: int, exclude_unseen: bool) -> list[str]:
    """The seen names, then other words by falling frequency. Equal frequencies: alphabetical order."""
    words = list(frequency)
    left_out = among(words, [*label_space.seen, *(label_space.unseen if exclude_unseen else [])])
    others = [word for word, out in zip(words, left_out, strict=True) if not out]
    others.sort(key=lambda word: (-frequency[word], word))
    return [*label_space.seen, *others[: num_words - len(label_space.seen)]]


def make_nouns(args: NounArgs) -> dict:
    """Writes the folder. Returns the content of its settings.json."""
    args.check()
    folder, source, label_space = Path(args.output), Path(args.captions), load_label_space(args.label_space)
    if folder.exists():
        raise InputError(f"--output {folder} exists: choose another or delete it")
    if args.num_words < len(label_space.seen):
        raise InputError(f"--num_words {args.num_words} is less than the {len(label_space.seen)} seen names")
    if not source.is_dir():
        raise InputError(f"--captions {source}: no such folder (relative paths start where the command does)")
    with writing_folder(folder) as partial:
        splits = read_splits(source, args.splits)
        captions = [texts for split in splits.values() for texts in split.values()]
        found, frequency = words_of(captions, label_space.class_names, args.num_workers)
        names = chosen_words(frequency, label_space, args.num_words, args.exclude_unseen)

        place = {name: position for position, name in enumerate(names)}
        rows = iter([np.array(sorted(place[w] for w in words if w in place), dtype=np.int32) for words in found])
        positions = {split: dict(zip(texts, rows, strict=False)) for split, texts in splits.items()}
        unseen = [] if args.exclude_unseen else label_space.unseen
        settings = {
            **{name: value for name, value in asdict(args).items() if name not in ("output", "num_workers")},
            "captions": dataset_name(args.captions),
            "label_space": Path(args.label_space).name,
            "label_space_sha256": label_space.sha256,
            "versions": {package: version(package) for package in PACKAGES},
            "num_images": {split: len(texts) for split, texts in splits.items()},
            "num_captions": sum(map(len, captions)),
            "num_different_words": len(frequency),
            "num_seen": len(label_space.seen),
            "unseen_listed": [name for name, listed in zip(names, among(names, unseen), strict=True) if listed],
            "images_with": {name: frequency[name] for name in names},
        }
        ignored = ignored_id(len(names))
        write_json(partial / "classes.json", {"classes": names, "unseen": [], "ignore_label": ignored})
        for split, nouns in positions.items():
            write_nouns(partial / f"nouns-{split}.parquet", list(nouns), list(nouns.values()))
        write_json(partial / "settings.json", settings)
    return settings


def read_splits(source: Path, names: list[str]) -> dict[str, dict[str, list[str]]]:
    """split -> image_id -> captions. Raises InputError if an image is in two splits."""
    splits = {split: read_captions(source, split) for split in names}
    times = Counter(image_id for captions in splits.values() for image_id in captions)
    repeated = next((image_id for image_id in times if times[image_id] > 1), None)
    if repeated is not None:
        raise InputError(f"image {repeated!r} is in more than one of the splits {', '.join(splits)}: give it to one")
    return splits


def words_of(
    captions: list[list[str]], class_names: list[str], num_workers: int
) -> tuple[list[list[str]], Counter[str]]:
    """The names and nouns of each image, and the number of images of each word."""
    load_tagger()  # before the processes start, so that they share it
    loader = DataLoader(
        CaptionWords(captions, class_names),
        batch_size=IMAGES_AT_ONCE,
        collate_fn=list,
        num_workers=num_workers,
    )
    found, frequency = [], Counter()
    with tqdm(total=len(captions), unit="image", mininterval=1) as bar:
        for batch in loader:
            found += [[sys.intern(word) for word in words] for words in batch]  # all images share one text in memory
            bar.update(len(batch))
    for words in found:
        frequency.update(words)
    return found, frequency


def report(settings: dict) -> str:
    """What was made, for the terminal."""
    images, count = settings["images_with"], settings["num_seen"]
    seen, others = list(images)[:count], list(images)[count:]
    silent = [name for name in seen if not images[name]]
    missing = settings["num_words"] - len(images)
    lines = [
        f"{len(images)} class names from {sum(settings['num_images'].values())} images with "
        f"{settings['num_captions']} captions: {len(seen)} seen names, {len(others)} other nouns",
        f"  most frequent: {', '.join(f'{name} {images[name]}' for name in others[:10])}",
    ]
    if others:
        lines.append(f"  least frequent: {others[-1]}, in {images[others[-1]]} images")
    if missing > 0:
        lines.append(f"  the captions have no more nouns: {missing} of num_words are missing")
    if silent:
        shown = ", ".join(silent[:20]) + ", ..." * (len(silent) > 20)
        lines.append(f"  {len(silent)} seen names are in no caption: {shown}")
    return "\n".join(lines)


def main() -> None:
    args, _ = read_arguments(NounArgs)
    print(report(make_nouns(args)))
