"""Text vectors: prompts embedded without needless padding, vectors kept in memory and on disk, label lists checked."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from tokenizers import normalizers, processors

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
    """Embed lists that overlap, each in a cache of its own; the folder holds a few of them."""
    model, ours, names = tiny_model(), processor(), [str(number) for number in range(40)]
    for number in range(times):
        first = number % 20
        TextCache(folder, max_bytes=20_000).embed(labels(own_name, *names[first : first + 20]), model, ours)


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
    assert left and all(path.suffix == ".safetensors" for path in left)
    assert sum(path.stat().st_size for path in left) <= 20_000
    for path in left:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        assert load_file(path)["vectors"].shape[1] == 12


def test_a_cache_reads_what_another_has_written_since(model, tmp_path):
    first, second, ours = TextCache(tmp_path), TextCache(tmp_path), processor()
    first.embed(labels("sky"), model, ours)
    second.embed(labels("sea"), model, ours)
    first.embed(labels("sea", "sky"), model, ours)
    assert model.calls == [1, 1]


def test_a_file_that_vanishes_while_it_is_wanted_is_a_miss(model, tmp_path, monkeypatch, caplog):
    ours = processor()
    expected = TextCache(tmp_path).embed(labels("sky"), model, ours)
    (path,) = files(tmp_path)
    read_bytes = Path.read_bytes

    def evicted(self: Path) -> bytes:
        self.unlink()
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", evicted)
    assert torch.equal(TextCache(tmp_path).embed(labels("sky"), model, ours), expected)
    assert model.calls == [1, 1] and caplog.records == []
    assert files(tmp_path) == [path]  # written anew


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "one bit"])
def test_a_damaged_file_is_named_once_and_removed(damage, model, tmp_path, caplog):
    ours = processor()
    expected = TextCache(tmp_path).embed(labels("sky", "sea"), model, ours)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    bit = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    path.write_bytes({"cut": data[:-20], "empty": b"", "zeros": bytes(len(data)), "one bit": bit}[damage])
    cache = TextCache(tmp_path)
    embeds = cache.embed(labels("sea"), model, ours)
    torch.testing.assert_close(embeds, expected[1:], rtol=0, atol=1e-6)
    cache.embed(labels("sky"), model, ours)
    assert model.calls == [2, 1, 1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert path not in files(tmp_path)


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
    assert len(files(home / "zs3" / "text_embeds")) == 1
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
