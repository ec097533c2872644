"""Evaluates checkpoints of every family in one group of two processes; test_encoders.py starts them.

    all_families.py FOLDER DATA

FOLDER/FAMILY/joined has class_head "regions"; FOLDER/FAMILY/encoder is an encoder for the ensemble of FOLDER/learned.
The results are FOLDER/FAMILY/joined.json and ensemble.json.
"""

import sys
from pathlib import Path

from accelerate import Accelerator

from eval import EvalArgs, evaluate


def evaluations(folder: Path, data: Path) -> list[EvalArgs]:
    """Their outputs are in the families' folders."""
    asked = []
    for family in sorted(path for path in folder.iterdir() if (path / "joined").is_dir()):
        common = {"dataset": str(data), "setting": "ovs", "num_workers": 0}
        asked.append(EvalArgs(model=str(family / "joined"), output=str(family / "joined.json"), **common))
        ensemble = {"encoder": str(family / "encoder"), "ensemble": "single_pass", "ensemble_weight": "0.6"}
        asked.append(
            EvalArgs(model=str(folder / "learned"), output=str(family / "ensemble.json"), **ensemble, **common)
        )
    return asked


def main() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for args in evaluations(*map(Path, sys.argv[1:])):
        evaluate(args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
