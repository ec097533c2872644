"""Text vectors: prompts embedded without needless padding, vectors kept in memory and on disk, label lists checked."""

import gc
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import get_ident

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import byte_tokenizer, tiny_model
from tokenizers import normalizers, processors

import text_zs3
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import Label, SimilarNames, TextCache, embed_labels, lint_labels, read_labels

TEMPLATES = ["a {}.", "one {}"]
NAMES = ["sky", ["dog", "big dog"], "sea", {"name": "road", "templates": ["the {}"]}]


def processor(lower_case: bool = True) -> Zs3Processor:
    tokenizer = byte_tokenizer()
    if not lower_case:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return Zs3Processor(Zs3ImageProcessor(), tokenizer, TEMPLATES)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """Where TextCache writes by default."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(monkeypatch):
    """A tiny model whose `calls` are the numbers of labels of each call of encode_text."""
    model = tiny_model()
    encode, model.calls = model.encode_text, []

    def counted(input_ids, attention_mask):
        model.calls.append(len(input_ids))
        return encode(input_ids, attention_mask)

    monkeypatch.setattr(model, "encode_text", counted)
    return model


def labels(*names) -> list[Label]:
    return read_labels(list(names), TEMPLATES)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def written(path: Path, data: bytes) -> bytes:
    """The content of a file of format 2: SHA-256 of "<folder>/<name>" and the data, then the data."""
    return hashlib.sha256(f"{path.parent.name}/{path.stem}".encode() + data).digest() + data


def vector_of(path: Path) -> np.ndarray:
    """The vector (D,) in a file of the cache, which must be undamaged."""
    data = path.read_bytes()[32:]
    assert path.read_bytes() == written(path, data)
    return np.frombuffer(data, np.float32)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


WATCHED: list[Counter] = []  # counters of the steps that `operations` is watching now


def watch(event: str, arguments: tuple) -> None:
    if WATCHED and event.startswith(("open", "os.", "glob.")):
        WATCHED[-1][event] += 1


@pytest.fixture(scope="module")
def operations() -> Callable[[Callable], Counter]:
    """Counts a step's operations on files, as Python's auditing names them, and "calls" of functions of any kind."""
    sys.addaudithook(watch)  # for as long as the process lives

    def count(step: Callable[[], object]) -> Counter:
        counter, stat, mine = Counter(), os.stat, get_ident()

        def counted(*words, **options):  # auditing has no event for it
            counter["os.stat"] += 1
            return stat(*words, **options)

        def called(frame, event, argument):
            counter["calls"] += event in ("call", "c_call") and get_ident() == mine

        WATCHED.append(counter)
        os.stat = counted
        gc.disable()  # it calls functions now and then
        sys.setprofile(called)
        try:
            step()
        finally:
            sys.setprofile(None)
            gc.enable()
            os.stat = stat
            WATCHED.remove(counter)
        return counter

    return count


def age(path: Path, seconds: float) -> None:
    """As if last used so long ago."""
    os.utime(path, (time.time() - seconds,) * 2)


# ------------------------------------------------------------------------------------------------------ encode_text


@pytest.mark.parametrize("eos_token_id", [513, 2])  # 2: a config from before transformers pooled at that id
def test_prompts_of_any_length_are_embedded_as_each_alone(eos_token_id, monkeypatch):
    monkeypatch.setattr("text_zs3.PROMPTS_AT_ONCE", 4)
    model, tokenizer = tiny_model(), byte_tokenizer()
    model.text_model.text_model.eos_token_id = eos_token_id
    names = ["x" * length for length in (30, 2, 17, 2, 9, 25, 1, 70, 4)]
    alone = []
    for name in names:
        ids = tokenizer(name, return_tensors="pt")["input_ids"]
        assert ids.shape == (1, len(name) + 2)
        with torch.no_grad():
            alone.append(F.normalize(model.text_model(input_ids=ids).text_embeds[0], dim=-1))
    widths = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    tokens = Zs3Processor(Zs3ImageProcessor(), tokenizer, ["{}"])(class_names=[[name] for name in dict.fromkeys(names)])
    assert tokens["input_ids"].shape == (8, 1, 72)
    embeds = model.encode_text(**tokens)
    expected = torch.stack([alone[names.index(name)] for name in dict.fromkeys(names)])
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert widths == [(4, 11), (4, 72)]  # 1 2 4 9 and 17 25 30 70 letters, each with start and end


def test_a_prompts_vector_does_not_depend_on_its_place():
    model, ours = tiny_model(), processor()
    tokens = ours(class_names=NAMES)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model.encode_text(tokens["input_ids"][order], tokens["attention_mask"][order])
    torch.testing.assert_close(shuffled, model.encode_text(**tokens)[order], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- embed_labels


def test_labels_are_embedded_as_the_processors_prompts_with_and_without_a_cache(model):
    ours, cache = processor(), TextCache(None)
    expected = tiny_model().encode_text(**ours(class_names=NAMES))
    assert torch.equal(embed_labels(labels(*NAMES), model, ours), expected)
    for _ in range(2):
        assert torch.equal(embed_labels(labels(*NAMES), model, ours, cache), expected)
    assert model.calls == [4, 4]  # the second look into the cache embeds nothing


def test_words_apart_have_a_vector_each(model):
    rich, ours = labels(["sky", "heaven"], "sea", ["dog", "hound", "puppy"]), processor()
    apart = embed_labels(rich, model, ours, apart=True)
    assert torch.equal(apart, embed_labels(labels("sky", "heaven", "sea", "dog", "hound", "puppy"), model, ours))
    whole = embed_labels(rich, model, ours)
    sums = torch.stack([apart[:2].sum(0), apart[2], apart[3:].sum(0)])
    assert (F.normalize(sums, dim=-1) * whole).sum(-1).min() > 0.9  # of like directions, though not of equal weights


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused_each_time(model):
    ours, same = processor(), labels("x" * 100 + "a", "x" * 100 + "b")
    for cache in (None, TextCache(None)):
        for _ in range(2):
            with pytest.raises(ValueError, match="become the same tokens"):
                embed_labels(same, model, ours, cache)
    assert not model.calls


def test_a_list_that_was_changed_after_it_was_read_is_read_again(model):
    ours, cache, names = processor(), TextCache(None), labels("sky", "sea")
    embed_labels(names, model, ours, cache)
    names += labels("x" * 100 + "a", "x" * 100 + "b")
    with pytest.raises(ValueError, match="become the same tokens"):
        embed_labels(names, model, ours, cache)


# ------------------------------------------------------------------------------------------------------- the cache


def test_the_cache_gives_what_encode_text_gives_to_the_last_bit(model, tmp_path):
    ours, cache = processor(), TextCache(tmp_path)
    expected = tiny_model().encode_text(**ours(class_names=NAMES))
    for _ in range(2):
        embeds = cache.embed(labels(*NAMES), model, ours)
        assert torch.equal(embeds, expected) and embeds.dtype == torch.float32
        embeds.zero_()  # the caller's own
    backwards = cache.embed(labels(*NAMES)[::-1], model, ours)
    assert torch.equal(backwards, expected.flip(0))
    assert model.calls == [4]


def test_only_missing_labels_are_embedded_in_one_call_and_each_once(model):
    cache, ours = TextCache(None), processor()
    cache.embed(labels("sky", "sea"), model, ours)
    embeds = cache.embed([*labels("dog", "sky", "cow"), *labels("dog")], model, ours)
    assert model.calls == [2, 2]
    assert torch.equal(embeds[0], embeds[3]) and not torch.equal(embeds[0], embeds[2])
    torch.testing.assert_close(embeds[1], cache.embed(labels("sky"), model, ours)[0], rtol=0, atol=0)


def test_another_word_or_template_is_another_entry_and_another_name_is_not(model):
    cache, ours = TextCache(None), processor()
    cache.embed(labels("dog", ["sky", "air"]), model, ours)
    for other in (
        Label("dog", ("dog",), ("the {}",)),
        Label("dog", ("dog",), tuple(TEMPLATES[::-1])),
        Label("dog", ("dog", "hound"), tuple(TEMPLATES)),
        Label("sky", ("sky",), tuple(TEMPLATES)),
        Label("cow", ("cow",), tuple(TEMPLATES)),
    ):
        cache.embed([other], model, ours)
    assert model.calls == [2, 1, 1, 1, 1, 1]
    cache.embed([Label("hound", ("dog",), tuple(TEMPLATES))], model, ours)  # the name itself is no prompt
    assert len(model.calls) == 6


def test_upper_case_shares_an_entry_where_the_tokenizer_lowers_it(model):
    cache = TextCache(None)
    lower, exact = processor(), processor(lower_case=False)
    cache.embed(labels("cat"), model, lower)
    cache.embed(labels("CAT "), model, lower)
    assert model.calls == [1]
    first = cache.embed(labels("cat"), model, exact)
    second = cache.embed(labels("CAT"), model, exact)
    assert model.calls == [1, 1, 1] and not torch.equal(first, second)


def keep_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def start_twice(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> <|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 512), ("<|endoftext|>", 513)],
    )


def add_a_token(tokenizer):
    tokenizer.add_tokens(["at"])


def cut_sooner(tokenizer):
    tokenizer.model_max_length = 5


@pytest.mark.parametrize("change", [keep_case, start_twice, add_a_token, cut_sooner])
def test_a_tokenizer_changed_in_place_is_another_one(change, model):
    model.text_model.resize_token_embeddings(600)
    cache, ours = TextCache(None), processor()
    cache.embed(labels("Cat"), model, ours)
    change(ours.tokenizer)
    embeds = cache.embed(labels("Cat"), model, ours)
    assert model.calls == [1, 1]
    assert torch.equal(embeds, type(model).encode_text(model, **ours(class_names=["Cat"])))


def test_how_the_last_call_padded_is_no_part_of_the_tokenizer(model, tmp_path):
    ours, again = processor(), processor()
    again.tokenizer(["a", "bcd"], padding="max_length", max_length=9, truncation=True)
    TextCache(tmp_path).embed(labels("cat"), model, ours)
    TextCache(tmp_path).embed(labels("cat"), model, again)
    assert model.calls == [1]


def change_in_place(model):
    with torch.no_grad():
        model.text_model.text_model.final_layer_norm.bias[3] += 1


def change_by_optimizer(model):
    weight = model.text_model.text_projection.weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def replace(model):
    model.text_model.text_projection.weight = torch.nn.Parameter(torch.randn(12, 16))


def turn_in_place(model):
    layer = model.text_model.text_model.encoder.layers[0].mlp.fc1
    layer.weight = torch.nn.Parameter(layer.weight.detach().reshape(16, 32).T)  # the same memory, read otherwise


def load(model):
    model.text_model.load_state_dict(tiny_model(seed=5).text_model.state_dict())


def change_data(model):
    model.text_model.text_projection.weight.data.mul_(-1)


def round_to_bfloat16_and_back(model):
    model.text_model.to(torch.bfloat16).to(torch.float32)


def change_precision(model):
    model.text_model.to(torch.bfloat16)


def change_config(model):
    model.text_model.config.layer_norm_eps = 0.5
    model.text_model.text_model.final_layer_norm.eps = 0.5


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_by_optimizer,
        replace,
        turn_in_place,
        load,
        change_data,
        round_to_bfloat16_and_back,
        change_precision,
        change_config,
    ],
)
def test_a_changed_encoder_is_another_one(change, model, tmp_path):
    cache, ours = TextCache(tmp_path), processor()
    before = cache.embed(labels("sky", "sea"), model, ours)
    change(model)
    after = cache.embed(labels("sky", "sea"), model, ours)
    assert model.calls == [2, 2] and not torch.equal(before, after)
    assert torch.equal(after, type(model).encode_text(model, **ours(class_names=["sky", "sea"])))
    cache.embed(labels("sky", "sea"), model, ours)
    assert len(model.calls) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_changes_of_weights_made_in_inference_mode_are_noticed(monkeypatch):
    with torch.inference_mode():
        model = tiny_model()
        cache, ours = TextCache(None), processor()
        before = cache.embed(labels("sky"), model, ours)
        assert torch.equal(cache.embed(labels("sky"), model, ours), before)
        model.text_model.text_model.final_layer_norm.bias[3] += 1
        assert not torch.equal(cache.embed(labels("sky"), model, ours), before)


def test_vectors_made_in_inference_mode_serve_outside_of_it(model, tmp_path):
    cache, ours = TextCache(tmp_path), processor()
    with torch.inference_mode():
        inside = cache.embed(labels("sky", "sea"), model, ours)
    scale = torch.ones(12, requires_grad=True)
    (cache.embed(labels("sky", "sea"), model, ours) * scale).sum().backward()
    torch.testing.assert_close(scale.grad, inside.sum(0))
    assert model.calls == [2]


def test_weights_elsewhere_in_the_model_do_not_matter(model, tmp_path):
    cache, ours = TextCache(tmp_path), processor()
    cache.embed(labels("sky"), model, ours)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("text_model."):
                weight.add_(1)
    cache.embed(labels("sky"), model, ours)
    assert model.calls == [1]


def test_a_model_without_a_text_tower_is_refused():
    with pytest.raises(ValueError, match="no text tower"):
        TextCache(None).embed(labels("sky"), tiny_model(text=False), processor())


def test_vectors_that_are_not_numbers_are_an_error_and_nothing_is_kept(model, tmp_path):
    cache, ours = TextCache(tmp_path), processor()
    letter = ours.tokenizer.convert_tokens_to_ids("y</w>")
    with torch.no_grad():
        model.text_model.text_model.embeddings.token_embedding.weight[letter] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 2 text vectors have no direction, row 0 first"):
            cache.embed(labels("sky", "sea"), model, ours)
    assert files(tmp_path) == []
    assert cache.embed(labels("sea"), model, ours).isfinite().all()


# ------------------------------------------------------------------------------------------------------ the folder


def test_the_default_folder_is_in_hugging_faces_home(home, tmp_path):
    assert TextCache().folder == home / "zs3" / "text_embeds"
    assert TextCache(None).folder is None and TextCache(str(tmp_path)).folder == tmp_path


def test_memory_alone_writes_nothing(model, tmp_path):
    TextCache(None).embed(labels("sky"), model, processor())
    assert files(tmp_path) == []


READER = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from tiny import tiny_model
from test_text import labels, processor
from text_zs3 import TextCache
model = tiny_model()
def refuse(**tokens):
    raise AssertionError("encode_text was called")
model.encode_text = refuse
print(json.dumps(TextCache(sys.argv[3]).embed(labels("sea", "sky"), model, processor()).tolist()))
"""

WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_text import write_many
write_many(sys.argv[3], "child", 100)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    here = Path(__file__).parent
    words = [sys.executable, "-c", script, here, here.parent, *arguments]
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def write_many(folder: str, own_name: str, times: int) -> None:
    """Embed lists that overlap, each in a cache of its own; the folder holds 25 vectors."""
    model, ours, names = tiny_model(), processor(), [str(number) for number in range(40)]
    for number in range(times):
        first = number % 20
        TextCache(folder, max_bytes=2000).embed(labels(own_name, *names[first : first + 20]), model, ours)


def test_another_process_finds_the_vectors_on_disk(model, tmp_path):
    expected = TextCache(tmp_path).embed(labels("sky", "sea"), model, processor())
    found, _ = finish(start(READER, tmp_path))
    assert torch.equal(torch.tensor(json.loads(found)), expected.flip(0))


def test_two_processes_that_write_at_once_leave_a_readable_folder(tmp_path, caplog):
    child = start(WRITER, tmp_path)
    while child.poll() is None and not files(tmp_path):
        time.sleep(0.02)
    write_many(tmp_path, "parent", 50)
    assert child.poll() is None  # they did overlap
    _, errors = finish(child)
    warnings = errors + caplog.text
    assert "damaged" not in warnings and "cannot be written" not in warnings
    left = files(tmp_path)
    assert left and all(path.suffix == ".vector" for path in left)
    assert held(tmp_path) <= 2000 + 2 * (2000 / 16 + 80)  # each process: a sixteenth, and the file that exceeds it
    assert all(np.linalg.norm(vector_of(path)) == pytest.approx(1, abs=1e-6) for path in left)
    assert {vector_of(path).shape for path in left} == {(12,)}


def test_a_cache_reads_what_another_has_written_since(model, tmp_path):
    first, second, ours = TextCache(tmp_path), TextCache(tmp_path), processor()
    first.embed(labels("sky"), model, ours)
    second.embed(labels("sea"), model, ours)
    first.embed(labels("sea", "sky"), model, ours)
    assert model.calls == [1, 1]


@pytest.mark.parametrize("when", ["before it is opened", "before it is marked as used"])
def test_a_file_that_vanishes_while_it_is_wanted_is_no_error(when, model, tmp_path, monkeypatch, caplog):
    ours = processor()
    expected = TextCache(tmp_path).embed(labels("sky"), model, ours)
    (path,) = files(tmp_path)
    module, name = (text_zs3, "open") if when == "before it is opened" else (os, "utime")
    original = getattr(module, name, open)

    def evicted(place: str, *words, **options):
        os.unlink(place)
        return original(place, *words, **options)

    monkeypatch.setattr(module, name, evicted, raising=False)
    assert torch.equal(TextCache(tmp_path).embed(labels("sky"), model, ours), expected)
    assert caplog.records == []
    if module is text_zs3:
        assert model.calls == [1, 1] and files(tmp_path) == [path]  # written anew
    else:
        assert model.calls == [1] and files(tmp_path) == []


UNIT = np.eye(12)[3]  # float64
DAMAGE = {
    "cut": lambda path: path.read_bytes()[:-20],
    "empty": lambda path: b"",
    "zeros": lambda path: bytes(80),
    "one bit of the vector": lambda path: path.read_bytes()[:-3] + b"\x01" + path.read_bytes()[-2:],
    "one bit of the hash": lambda path: bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:],
    "more after the end": lambda path: path.read_bytes() + b"0000",
    "the file of another label": lambda path: next(p for p in files(path.parent) if p != path).read_bytes(),
}
PLANTED = {  # with the right hash
    "nothing": np.empty(0),
    "float64": UNIT,
    "float16": UNIT.astype(np.float16),
    "float64 of as many bytes": UNIT[:6].astype(np.float64),
    "float16 of as many bytes": np.eye(24, dtype=np.float16)[3],
    "integers": UNIT.astype(np.int32),
    "two vectors": np.stack([UNIT, UNIT]).astype(np.float32),
    "of an encoder with one more": np.eye(13, dtype=np.float32)[3],
    "of an encoder with one less": np.eye(11, dtype=np.float32)[3],
    "a part of a number": np.frombuffer(UNIT.astype(np.float32).tobytes() + b"0", np.uint8),
    "zeros": np.zeros(12, np.float32),
    "too long": UNIT.astype(np.float32) * 1.01,
    "too short": UNIT.astype(np.float32) * 0.99,
    "NaN": np.where(UNIT, np.nan, 0).astype(np.float32),
    "infinite": np.where(UNIT, np.inf, 0).astype(np.float32),
    "beyond the numbers' range": np.full(12, 3e38, np.float32),
}
DAMAGE |= {f"planted: {kind}": lambda path, v=values: written(path, v.tobytes()) for kind, values in PLANTED.items()}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("error")
def test_a_damaged_or_planted_file_is_named_once_and_its_label_embedded_anew(damage, model, tmp_path, caplog):
    ours = processor()
    expected = TextCache(tmp_path).embed(labels("sky"), model, ours)
    (path,) = files(tmp_path)
    expected = torch.cat([expected, TextCache(tmp_path).embed(labels("sea"), model, ours)])
    path.write_bytes(DAMAGE[damage](path))
    cache = TextCache(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(cache.embed(labels("sky", "sea"), model, ours), expected, rtol=0, atol=1e-6)
    assert torch.equal(
        TextCache(tmp_path).embed(labels("sky", "sea"), model, ours), cache.embed(labels("sky", "sea"), model, ours)
    )
    assert model.calls == [1, 1, 1] and len(files(tmp_path)) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is damaged: computed again" in caplog.text and "\n" not in caplog.records[0].getMessage()


def test_a_vector_within_rounding_of_unit_length_is_no_damage(model, tmp_path, caplog):
    ours = processor()
    TextCache(tmp_path).embed(labels("sky"), model, ours)
    (path,) = files(tmp_path)
    vector = (UNIT * (1 + 1e-5)).astype(np.float32)
    path.write_bytes(written(path, vector.tobytes()))
    assert TextCache(tmp_path).embed(labels("sky"), model, ours)[0].tolist() == vector.tolist()
    assert model.calls == [1] and caplog.records == []


def test_many_damaged_files_cost_one_warning_and_are_removed(model, tmp_path, caplog, monkeypatch):
    ours, names = processor(), [str(number) for number in range(9)]
    TextCache(tmp_path).embed(labels(*names), model, ours)
    for path in files(tmp_path):
        path.write_bytes(b"")
    monkeypatch.setattr(model, "encode_text", None)
    with pytest.raises(TypeError):
        TextCache(tmp_path).embed(labels(*names), model, ours)
    assert files(tmp_path) == []
    (record,) = caplog.records
    assert " is damaged, and so are 8 more: computed again" in record.getMessage()


def test_files_of_format_1_are_not_read_and_go_first(model, tmp_path, caplog, operations):
    ours = processor()
    TextCache(tmp_path).embed(labels("sky"), model, ours)
    (path,) = files(tmp_path)
    for folder in (path.parent, path.parent.with_name("0" * 64)):
        folder.mkdir(exist_ok=True)
        old = folder / f"{path.stem}.safetensors"
        save_file({"keys": torch.zeros(16, dtype=torch.uint8), "vectors": torch.ones(1, 12)}, old)
        age(old, 1000)
    path.unlink()
    again = operations(lambda: TextCache(tmp_path, 10**6).embed(labels("sky"), model, ours))
    assert again["open"] == 2  # both of the new file: it is not there; written
    assert model.calls == [1, 1] and caplog.records == [] and len(files(tmp_path)) == 3
    TextCache(tmp_path, max_bytes=160).embed(labels("sea"), model, ours)
    assert len(files(tmp_path)) == 2 and all(left.suffix == ".vector" for left in files(tmp_path))


# ------------------------------------------------------------------------------------------------- size and bounds


def test_a_call_costs_the_same_whatever_the_cache_holds(model, tmp_path, operations):
    ours, found, known = processor(), {}, labels(*[f"label {number}" for number in range(10)])
    for entries in (50, 2000):
        folder, warm = tmp_path / str(entries), TextCache(tmp_path / str(entries))
        warm.embed(labels(*[f"label {number}" for number in range(entries)]), model, ours)
        assert len(files(folder)) == entries
        fresh, other = TextCache(folder), TextCache(folder)
        steps = {
            "known, on disk": lambda fresh=fresh: fresh.embed(known, model, ours),
            "known, in memory": lambda warm=warm: warm.embed(known, model, ours),
            "new, first call": lambda other=other: other.embed(labels("new a"), model, ours),
            "new, after others": lambda warm=warm: warm.embed(labels("new b"), model, ours),
        }
        found[entries] = {name: operations(step) for name, step in steps.items()}
    assert found[50] == found[2000]
    assert model.calls == [50, 1, 1, 2000, 1, 1]
    memory, disk = found[50]["known, in memory"], found[50]["known, on disk"]
    assert memory.keys() == {"calls"}
    assert disk.keys() == {"calls", "open", "os.utime"} and disk["open"] == disk["os.utime"] == 10
    for name in ("new, first call", "new, after others"):
        new = found[50][name]
        assert new["open"] == 2  # it is not there; written
        assert new["os.rename"] == 1 and not {"os.listdir", "os.scandir", "glob.glob"} & new.keys()


def test_the_folder_exceeds_its_bound_by_a_sixteenth_and_is_seldom_listed(model, tmp_path, operations):
    ours, size = processor(), 80  # bytes of a file
    cache = TextCache(tmp_path, max_bytes=80 * size)
    most = listings = 0
    for number in range(200):
        names = labels(f"label {number}")
        listings += operations(lambda names=names: cache.embed(names, model, ours))["os.scandir"] > 0
        most = max(most, held(tmp_path))
    assert most == (80 + 5 - 1) * size
    assert 39 <= listings <= 41  # once for 5 files
    embedded = len(model.calls)
    newest = labels(*[f"label {number}" for number in range(200 - 75, 200)])
    TextCache(tmp_path).embed(newest, model, ours)
    assert len(model.calls) == embedded  # the oldest went first


def test_short_processes_keep_to_the_bound_too(model, tmp_path, monkeypatch, operations):
    """Each writes a fifth of what is written between two listings. Without the random start none would list."""
    draws = Random(0)
    monkeypatch.setattr("text_zs3.SystemRandom", lambda: draws)
    ours, size = processor(), 80
    most = listings = 0
    for number in range(200):
        cache, names = TextCache(tmp_path, max_bytes=80 * size), labels(f"label {number}")
        listings += operations(lambda cache=cache, names=names: cache.embed(names, model, ours))["os.scandir"] > 0
        most = max(most, held(tmp_path))
    assert 25 <= listings <= 55  # 40 are expected
    assert most <= (80 + 4 * 5) * size


def test_copies_have_the_vectors_and_a_memory_of_their_own(model):
    ours, cache = processor(), TextCache(None, max_bytes=2 * 48)
    expected = cache.embed(labels("sky", "sea"), model, ours)
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.embed(labels("sky", "sea"), model, ours), expected) and model.calls == [2]
    copy.embed(labels("cow", "dog"), model, ours)
    assert torch.equal(cache.embed(labels("sky", "sea"), model, ours), expected) and model.calls == [2, 2]


def test_the_least_recently_used_file_goes_first(model, tmp_path):
    ours = processor()
    for seconds, name in ((300, "sky"), (200, "sea"), (100, "cow")):
        TextCache(tmp_path).embed(labels(name), model, ours)
        newest = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        age(newest, seconds)
    size = newest.stat().st_size
    TextCache(tmp_path).embed(labels("sky"), model, ours)  # used again
    TextCache(tmp_path, max_bytes=3 * size).embed(labels("dog"), model, ours)
    assert len(files(tmp_path)) == 3 and model.calls == [1] * 4
    TextCache(tmp_path).embed(labels("sky", "cow", "dog"), model, ours)
    assert model.calls == [1] * 4
    TextCache(tmp_path).embed(labels("sea"), model, ours)
    assert model.calls == [1] * 5


def test_the_bound_counts_the_files_of_all_encoders_and_leaves_other_peoples_alone(model, tmp_path):
    ours, foreign = processor(), tmp_path / "somebody" / "model.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(bytes(10**6))
    TextCache(tmp_path).embed(labels("sky"), model, ours)
    (own,) = set(files(tmp_path)) - {foreign}
    unfinished = own.with_suffix(f".{'0' * 32}.partial")  # of a process that was killed
    unfinished.write_bytes(bytes(1000))
    beside = own.with_name("notes.safetensors")
    beside.write_bytes(bytes(1000))
    for path in (own, unfinished, foreign, beside):
        age(path, 1000)
    change_in_place(model)
    TextCache(tmp_path, max_bytes=own.stat().st_size).embed(labels("sky"), model, ours)
    left = set(files(tmp_path)) - {foreign, beside}
    assert {foreign, beside} <= set(files(tmp_path)) and len(left) == 1
    assert left.isdisjoint({own, unfinished})


def test_memory_is_bounded_too_and_a_list_beyond_the_bound_is_still_answered(model, tmp_path):
    ours, names = processor(), [str(number) for number in range(10)]
    cache = TextCache(None, max_bytes=5 * 12 * 4)
    expected = tiny_model().encode_text(**ours(class_names=names))
    assert torch.equal(cache.embed(labels(*names), model, ours), expected)
    for name in names[:6]:
        cache.embed(labels(name), model, ours)
    cache.embed(labels(*names[1:6]), model, ours)
    assert model.calls == [10, *[1] * 6]
    cache.embed(labels(names[0]), model, ours)  # the longest unused
    assert model.calls == [10, *[1] * 7]
    TextCache(tmp_path, max_bytes=0).embed(labels("sky"), model, ours)
    assert files(tmp_path) == []


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_can_only_be_read_serves_what_it_has(model, tmp_path, caplog):
    ours = processor()
    TextCache(tmp_path).embed(labels("sky"), model, ours)
    for folder in (tmp_path, files(tmp_path)[0].parent):
        folder.chmod(0o500)
    cache = TextCache(tmp_path)
    for _ in range(2):
        cache.embed(labels("sky", "sea"), model, ours)
    cache.embed(labels("cow"), model, ours)
    assert model.calls == [1, 1, 1]
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text


def test_a_folder_that_cannot_be_written_costs_one_warning(model, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache, ours = TextCache(tmp_path / "file"), processor()
    for names in (["sky"], ["sky", "sea"], ["sky", "sea"]):
        cache.embed(labels(*names), model, ours)
    assert model.calls == [1, 1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path / "file") in caplog.text and "\n" not in caplog.records[0].getMessage()


def test_a_full_disk_leaves_no_partial_file(model, tmp_path, monkeypatch, caplog):
    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache, ours = TextCache(tmp_path), processor()
    for _ in range(2):
        cache.embed(labels("sky"), model, ours)
    assert model.calls == [1] and files(tmp_path) == [] and len(caplog.records) == 1


# ----------------------------------------------------------------------------------------------------- label lists


def test_words_that_repeat_are_found_after_normalisation():
    report = lint_labels(["Cat", "dog", " CAT", ["sofa", "Dining  table", "couch"], {"name": "dining table"}, "cat"])
    assert report.class_names == ["Cat", "dog", "CAT", "sofa", "dining table", "cat"]
    assert report.duplicates == {"cat": [0, 2, 5], "dining table": [3, 4]}
    assert lint_labels([["sky", "Sky"], "sea"]).duplicates == {"sky": [0, 0]}
    assert lint_labels(["sky", "sea"]).duplicates == {}


def test_the_tokenizers_normalisation_counts_too():
    names = ["a \u2460", "a 1"]  # a number in a circle
    ours = processor()
    ours.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert lint_labels(names).duplicates == {}
    assert lint_labels(names, processor=ours).duplicates == {"a 1": [0, 1]}


@pytest.mark.parametrize(("names", "message"), [("sky", "must be a list"), ([], "empty"), (["sky", 3], "got 3")])
def test_what_is_no_label_list_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        lint_labels(names)


def test_near_synonyms_are_the_pairs_above_the_cosine(monkeypatch, model):
    ours, names = processor(), [f"name {number}" for number in range(23)]
    embeds = tiny_model().encode_text(**ours(class_names=names)).double()
    cosines = embeds @ embeds.T
    pairs = [(float(cosines[i, j]), names[i], names[j]) for i in range(23) for j in range(i + 1, 23)]
    pairs.sort(reverse=True)
    least = (pairs[39][0] + pairs[40][0]) / 2
    monkeypatch.setattr("text_zs3.COSINES_AT_ONCE", 50)  # two rows at a time
    report = lint_labels(names, model=model, processor=ours, cache=TextCache(None), similar=least)
    assert model.calls == [23] and len(report.near_synonyms) == 40
    assert [pair.cosine for pair in report.near_synonyms] == pytest.approx([pair[0] for pair in pairs[:40]], abs=1e-6)
    assert {pair[:2] for pair in report.near_synonyms} == {pair[1:] for pair in pairs[:40]}
    monkeypatch.setattr("text_zs3.MOST_PAIRS", 7)
    closest = lint_labels(names, model=model, processor=ours, cache=TextCache(None), similar=-1.0)
    assert closest.near_synonyms == report.near_synonyms[:7]


def test_equal_labels_are_no_near_synonyms(model):
    report = lint_labels(
        ["sky", "sea", "sky", "SKY"], model=model, processor=processor(), cache=TextCache(None), similar=-1
    )
    assert [pair[:2] for pair in report.near_synonyms] == [("sky", "sea")]
    assert model.calls == [2]


def test_names_too_long_for_the_tower_are_counted_in_tokens(model):
    long = "x" * 80
    ours = processor()
    report = lint_labels(["sky", [long, "y"], "z" * 70], model=model, processor=ours, cache=TextCache(None))
    assert report.too_long == {long: 80 + len("one") + 2} and report.max_tokens == 77  # spaces are no tokens
    ours.tokenizer.model_max_length = 10**30  # a tokenizer that cuts nothing: the tower would refuse
    assert lint_labels(["sky", long], model=model, processor=ours, cache=TextCache(None)).too_long == report.too_long
    assert lint_labels([long], model=model, processor=ours, cache=TextCache(None)).near_synonyms == []
    ours.tokenizer.model_max_length = 8
    cut = lint_labels(["sky", "meadow"], model=model, processor=ours, cache=TextCache(None))
    assert cut.too_long == {"meadow": 11} and cut.max_tokens == 8


def test_what_was_seen_is_compared_without_case_and_by_any_word(model):
    model.config.seen_class_names = ["Sky", "traffic  light", "sofa"]
    report = lint_labels(["sky", ["couch", "Sofa"], "TRAFFIC light", "zebra"], model=model)
    assert report.seen == ["sky", "couch", "TRAFFIC light"] and report.unseen == ["zebra"]
    model.config.seen_class_names = []
    assert lint_labels(["sky"], model=model).unseen == ["sky"]


def test_what_cannot_be_known_is_none_not_empty(model):
    report = lint_labels(["sky", "sea"])
    assert (report.near_synonyms, report.too_long, report.seen, report.unseen) == (None,) * 4
    textless = lint_labels(["sky", "x" * 80], model=tiny_model(text=False), processor=processor())
    assert textless.near_synonyms is None and list(textless.too_long) == ["x" * 80]
    whole = lint_labels(["sky"], model=model, processor=processor(), cache=TextCache(None))
    assert whole.near_synonyms == [] and whole.too_long == {} and whole.seen is None


def test_without_a_cache_of_its_own_lint_uses_the_default_folder(model, home):
    lint_labels(["sky", "sea"], model=model, processor=processor())
    assert len(files(home / "zs3" / "text_embeds")) == 2
    lint_labels(["sea", "sky"], model=model, processor=processor())
    assert model.calls == [2]


def test_a_report_is_short_lines_for_a_terminal(model):
    model.config.seen_class_names = ["sky"]
    long = "x" * 90
    report = lint_labels(
        ["sky", "Sky", long, *"abcdefghijklm"], model=model, processor=processor(), cache=TextCache(None)
    )
    report.near_synonyms = [SimilarNames("a", "b", 0.95123)]
    assert str(report).splitlines() == [
        "16 labels",
        "words that repeat: 1",
        "  'sky': label 0 'sky', label 1 'Sky'",
        "near-synonyms, cosine 0.94 or more: 1",
        "  0.951  'a', 'b'",
        "too long: 1",
        f"  95 tokens, 77 are read: '{long}'",
        "not seen in training: 14",
        f"  '{long}'",
        *(f"  '{letter}'" for letter in "abcdefghi"),
        "  and 4 more",
    ]
    assert str(lint_labels(["sky"])).splitlines()[2:] == [
        "near-synonyms, cosine 0.94 or more: not known",
        "too long: not known",
        "not seen in training: not known",
    ]
