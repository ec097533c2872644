"""The check of JSON files against a declared type: what passes, what is refused, and in which words."""

import json
from pathlib import Path
from typing import Literal, Required

import pytest
from typing_extensions import TypedDict

from zs3.command_line import InputError
from zs3.typed_json import Amount, Count, Share, read_json, read_json_lines


class Inner(TypedDict, total=False):
    low: Required[float]
    names: list[str]


class File(TypedDict, total=False):
    kind: Literal["a", "b"]
    count: Count
    share: Share | None
    amount: Amount
    number: float
    whole: int
    is_it: bool
    text: str
    by_name: dict[str, list[Share | None]]
    inner: Inner | None
    inners: list[Inner]
    several: bool | float | str | None


def read(folder: Path, text: str, needed: tuple[str, ...] = ()) -> File:
    (folder / "file.json").write_text(text)
    return read_json(folder / "file.json", File, "result file of a test", "make it again", needed)


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "b", "count": 0, "share": 1, "amount": 7, "number": 3, "whole": -2, "is_it": False, "text": ""},
        {"share": None, "by_name": {"x": [0, None, 0.5]}, "inner": None, "inners": [{"low": 1.5, "names": ["é"]}]},
        {"unknown": [True, {}], "inner": {"low": 0, "also": "unknown"}},
        {},
    ],
)
def test_what_is_of_its_type_is_read_as_it_is(tmp_path, content):
    assert read(tmp_path, json.dumps(content)) == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"share": true}', "share is true, not a number: make it again"),
        ('{"share": 1.5}', "share is 1.5, not a share in [0, 1]: make it again"),
        ('{"share": -1e-9}', "share is -1e-09, not a share in [0, 1]"),
        ('{"share": NaN}', "is no JSON (NaN is no number)"),
        ('{"share": "0.5"}', "share is '0.5', not a number"),
        ('{"share": ""}', "share is '', not a number"),
        ('{"share": [0.5]}', "share is a list, not a number"),
        ('{"number": 1e400}', "is no JSON (1e400 is no number)"),
        ('{"number": -Infinity}', "is no JSON (-Infinity is no number)"),
        ('{"number": 1' + 400 * "0" + "}", "number is 1000000000000000000000..., not a number"),
        ('{"number": null}', "number is null, not a number"),
        ('{"amount": -0.1}', "amount is -0.1, not a number of 0 or more"),
        ('{"count": 2.0}', "count is 2.0, not a whole number"),
        ('{"count": true}', "count is true, not a whole number"),
        ('{"count": -1}', "count is -1, not a count"),
        ('{"whole": 2.5}', "whole is 2.5, not a whole number"),
        ('{"is_it": 1}', "is_it is 1, not true or false"),
        ('{"text": 1}', "text is 1, not a text"),
        (r'{"text": "\ud800"}', "is no JSON ('utf-8' codec can't encode"),
        ('{"kind": "c"}', "kind is 'c', not 'a' or 'b'"),
        ('{"kind": ["a"]}', "kind is a list, not 'a' or 'b'"),
        ('{"by_name": [1]}', "by_name is a list, not a mapping"),
        ('{"by_name": {"x y": [0, null, 2]}}', "by_name.x y[2] is 2, not a share in [0, 1]"),
        ('{"inner": {}}', "inner.low is missing"),
        ('{"inner": {"low": 1, "names": [["a"]]}}', "inner.names[0] is a list, not a text"),
        ('{"inners": {"low": 1}}', "inners is a mapping, not a list"),
        ('{"inners": [{"low": 1}, {"low": false}]}', "inners[1].low is false, not a number"),
        ('{"several": [1]}', "several is a list, not true or false or a number or a text: make it again"),
        ("[1]", "is no result file of a test: it holds no mapping"),
        ("null", "is no result file of a test: it holds no mapping"),
        ("", "so no result file of a test: make it again"),
        (100000 * "[", "so no result file of a test: make it again"),
    ],
)
def test_what_is_not_of_its_type_is_one_line_with_file_field_value_and_mend(tmp_path, text, words):
    with pytest.raises(InputError) as refused:
        read(tmp_path, text)
    assert "file.json" in str(refused.value) and words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_line_has_at_most_200_characters_whatever_is_in_the_file(tmp_path):
    folder = tmp_path / ("deep" * 20) / ("deeper" * 20)
    folder.mkdir(parents=True)
    for content in (
        {"by_name": {300 * "name\n": [300 * "text\n"]}},
        {"kind": 300 * "c"},
        {"by_name": {"\u2028\x1b[0m": 1}},
    ):
        with pytest.raises(InputError) as refused:
            read(folder, json.dumps(content))
        message = str(refused.value)
        assert len(message) <= 200 and message.isprintable() and "file.json: " in message


def test_a_needed_key_may_lie_in_a_mapping(tmp_path):
    whole = '{"inner": {"low": 1}, "by_name": {"x": []}}'
    assert read(tmp_path, whole, ("inner", "inner.low", "by_name.x"))
    for name in ("text", "by_name.y", "inner.names", "inner.low.x"):
        with pytest.raises(InputError, match=f"file.json is no result file of a test, it lacks '{name}'"):
            read(tmp_path, whole, (name,))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json", File, "result file of a test", "make it again")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="bytes.json is no JSON"):
        read_json(tmp_path / "bytes.json", File, "result file of a test", "make it again")


def test_of_lines_the_wrong_one_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b": null}\n')
    kind = dict[str, float | None]
    assert read_json_lines(path, kind, "log", "train again") == [{"a": 1}, {"b": None}]
    for line, words in (
        ('{"a": true}', "line 3, a is true, not a number: train again"),
        ("[1]", "line 3, is a list"),
    ):
        path.write_text('{"a": 1}\n{"b": null}\n' + line)
        with pytest.raises(InputError, match=words):
            read_json_lines(path, kind, "log", "train again")


def test_a_damaged_line_is_left_out_with_a_word(tmp_path, capsys):
    for end in ("", '{"a": 2'):  # half a last line is what a killed process leaves, and no damage
        (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a"{"a": 2}\n{"a": 3}\n' + end)
        assert read_json_lines(tmp_path / "log.jsonl", dict[str, int], "log", "train again") == [{"a": 1}, {"a": 3}]
        printed = capsys.readouterr().out
        assert printed.startswith("warning: line 2 of ") and printed.count("\n") == 1
