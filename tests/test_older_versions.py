"""What commit c24e825 left (tests/fixtures) goes on loading, resuming and reading."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from train import main

FIXTURE = Path(__file__).parent / "fixtures" / "c24e825.zip"


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """Its contents, in the working folder."""
    shutil.unpack_archive(FIXTURE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_goes_on_with_one_warning_that_its_data_are_not_known(older, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run/recipe.yaml"])
    main()
    first = capsys.readouterr().out
    assert first.count("warning") == 1 and "has no stamp.json" in first and "resumed   at step 3" in first
    logs = [Path(path).read_text().splitlines() for path in ("run/metrics.jsonl", "undisturbed.jsonl")]
    ours, theirs = ([json.loads(line) for line in log] for log in logs)
    assert [values["step"] for values in ours] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "loss_class", "loss_mask", "loss_dice", "loss_rank", "learning_rate"):
        assert [values[name] for values in ours] == pytest.approx([values[name] for values in theirs], rel=5e-2)
    main()
    second = capsys.readouterr().out
    assert "warning" not in second and "nothing to do" in second


def test_after_its_first_start_a_run_is_bound_to_its_data(older, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run/recipe.yaml"])
    main()
    classes = json.loads(Path("scenes/classes.json").read_text())
    Path("scenes/classes.json").write_text(json.dumps({**classes, "unseen": [*classes["unseen"], "sand"]}))
    with pytest.raises(ValueError, match="'sand' was seen, is unseen now"):
        main()
