"""The tables of the paper as printed, later methods, and this project's own results where there are any.

    python -m benchmarks.paper_tables --output docs/paper_tables.md
    python -m benchmarks.paper_tables --suites runs/gzs3 runs/ovs5 --output docs/paper_tables.md

benchmarks/paper_tables.json has the numbers. --suites: folders that `eval.py --suite` wrote. Nothing is measured here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from zs3.command_line import Arguments, OutputFile, flag, read_arguments, run
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import read_result
from zs3.files import write_text
from zs3.scores.means import GeneralizedScores
from zs3.tables import markdown, markdown_table, percent

QUOTED = Path(__file__).with_suffix(".json")
NEEDED = (*GeneralizedScores._fields, "miou", "model", "protocol", "setting")
TEXT = """# The paper's tables

Made by `python -m benchmarks.paper_tables --output docs/paper_tables.md`. All numbers are quoted, in percent: those
of Tables 1 to 3 from the paper, which took those of other methods from their papers; those of later methods from
their own pages. Nothing of them was measured here. "Not run": this project has no result on this benchmark. Printed
hIoUs are not always the harmonic mean of the printed scores: in Table 1, CaGNet has 18.2 where it is 17.9. "-": not
given there.

**Compare settings before numbers.** *Inductive* methods do not know the unseen names before the test. *Transductive*
ones know them in training, and train on pictures that show unseen classes. The paper's main row is transductive: it
makes image labels of the unseen names with CLIP. Its Tables 1 and 2 compare it with inductive rows, and with rows
that train themselves again on their own label maps ("self-training").

**Beware of results that know the answer.** Some published numbers allow only the names that are in each test
picture. Others choose a background threshold for each data set. Such numbers are not comparable. Whether one of the
quoted numbers is of this kind was not checked. `eval.py` gives every picture all names.
"""


@dataclass
class PaperTableArgs(Arguments):
    """This project's results, if there are any."""

    suites: list[str] = flag([], "Folders that `eval.py --suite` wrote.")
    output: OutputFile | None = flag(None, "Markdown file.")


def own_results(folders: list[str]) -> dict[tuple[str, str], Result]:
    """(setting, benchmark) -> its result. The folders of both suites have a file of VOC-20."""
    members = {member for table in tables() for member in table["members"]}
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.json")) if file.stem in members]
    results = [(file.stem, read_result(file, NEEDED)) for file in files]
    return {(result["setting"], name): result for name, result in results}


def tables() -> list[dict]:
    return json.loads(QUOTED.read_text(encoding="utf-8"))["tables"]


def own_row(table: dict, results: dict[tuple[str, str], Result]) -> list[str]:
    """The last row of a table."""
    found = [results.get((table["setting"], member)) for member in table["members"]]
    names = ["miou"] if len(found) > 1 else GeneralizedScores._fields
    cells = [percent(result[name]) if result else "not run" for result in found for name in names]
    said = "; ".join(dict.fromkeys(markdown(f"{own['model']}, {own['protocol']}") for own in found if own))
    return ["**zs3**", said, *cells]


def text_of(results: dict[tuple[str, str], Result]) -> str:
    parts = [TEXT]
    for table in tables():
        rows = [
            [name, mark, *("-" if value is None else f"{value:.1f}" for value in values)]
            for name, mark, *values in table["rows"]
        ]
        head = ["method", table["mark"], *table["scores"]]
        parts += [f"## {table['title']}", "", *markdown_table(head, [*rows, own_row(table, results)]), ""]
    return "\n".join(parts)


def main() -> None:
    args, _ = read_arguments(PaperTableArgs)
    text = text_of(own_results(args.suites))
    print(text, end="")
    if args.output is not None:
        write_text(Path(args.output), text)


if __name__ == "__main__":
    run(main)
