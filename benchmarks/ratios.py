"""The table of ratios of docs/performance.md, and the rows of the README, from the result files of the benchmarks.

    python -m benchmarks.ratios

Nothing is measured here. Both times of a row are of one run of its benchmark. "Times as fast" is the median of the
rounds' ratios where both ways took turns (network, train_step, criterion), else the ratio of the two times.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import measuring
from zs3.command_line import Arguments, InputError, flag, read_arguments, run

RESULTS = Path(__file__).parent.parent / "docs" / "results"
NAMES = ("label_count", "network", "network_compiled", "train_step", "criterion", "text_side", "loader")
NAMES += ("clip_views", "pseudo_labels")
PEER = "transformers' Mask2Former"
TITLES = ("computation", "compared with", "its time, memory", "those of zs3", "times as fast", "share of its memory")
TITLES += ("benchmark",)
README_TITLES = ("computation", PEER, "zs3")


@dataclass
class RatioArgs(Arguments):
    """The folder of the result files."""

    results: str = flag(str(RESULTS), "Folder of the result files.")


class Ratio(NamedTuple):
    """A way of this project and another one. seconds, mib: of the other and of this; None: not measured."""

    computation: str
    other: str
    seconds: tuple[float, float]
    times: float  # as fast
    mib: tuple[float, float] | None
    script: str
    in_readme: bool = False

    def cells(self) -> list[str]:
        """Of `TITLES`."""
        share = "-" if self.mib is None else f"{self.mib[1] / self.mib[0]:.2g}"
        times = f"{self.times:.2f}" if self.times < 100 else f"{self.times:,.0f}"
        return [self.computation, self.other, *self.both(), times, share, f"`{self.script}`"]

    def both(self) -> list[str]:
        """Time and memory of the other way and of this one."""
        peaks = ["", ""] if self.mib is None else [f", {mib:.0f} MiB" for mib in self.mib]
        return [f"{_time(seconds)}{peak}" for seconds, peak in zip(self.seconds, peaks, strict=True)]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def ratio_of(computation: str, other: tuple[str, dict], ours: dict, script: str, in_readme: bool = False) -> Ratio:
    """other: its name and row; a row has seconds, perhaps peak_mib, and ours may have times_faster."""
    name, row = other
    times = ours.get("times_faster", row["seconds"] / ours["seconds"])
    mib = (row["peak_mib"], ours["peak_mib"]) if "peak_mib" in row else None
    return Ratio(computation, name, (row["seconds"], ours["seconds"]), times, mib, script, in_readme)


def label_map_ratios(result: dict) -> list[Ratio]:
    rows = {(row["kind"], row["labels"], row["size"], row["method"]): row for row in result["rows"] if "seconds" in row}
    kinds = {"like a trained model's": "", "soft": ", soft masks"}
    cases = [(kind, *case) for kind in kinds for case in ((150, 640), (847, 1024), (4000, 640))]
    found = []
    for kind, labels, size in cases:
        peer, ours = (
            rows[kind, labels, size, method] for method in ("transformers' Mask2Former post-processing", "semantic_map")
        )
        computation = f"label map, {labels} labels, {size} x {size}{kinds[kind]}"
        in_readme = (kind, labels) == ("like a trained model's", 847)
        found.append(ratio_of(computation, (PEER, peer), ours, "label_count", in_readme))
    return found


def network_ratios(result: dict, script: str, computation: str, way: str) -> list[Ratio]:
    names = {"resnet50": "ResNet-50", "swin_tiny": "Swin-T"}
    found = []
    for row in result["results"]:
        frozen = row.get("norms", "frozen") == "frozen"
        if frozen and way in row["networks"]:
            size = f"{names[row['backbone']]}, {row['size']} x {row['size']}"
            other, ours = row["networks"][PEER], row["networks"][way]
            in_readme = row["backbone"] == "resnet50" and row["size"] == 512 and row["mode"] == "eager"
            found.append(ratio_of(f"{computation}, {size}", (PEER, other), ours, script, in_readme))
    return found


def criterion_ratios(result: dict) -> list[Ratio]:
    peer, ours = "transformers' Mask2FormerLoss", "zs3, Eq. 8 (focal loss, ranking loss, unpaired)"
    return [
        ratio_of(
            f"criterion, {row['classes']} classes an image",
            (peer, row["criteria"][peer]),
            row["criteria"][ours],
            "criterion",
        )
        for row in result["results"]
    ]


def timed(computation: str, other: str, seconds: tuple[float, float], script: str, times: float | None = None) -> Ratio:
    """Without memory. times: the median of the rounds' ratios; None: there is only the ratio of the times."""
    return Ratio(computation, other, seconds, seconds[0] / seconds[1] if times is None else times, None, script)


def text_ratios(result: dict) -> list[Ratio]:
    seconds, new = result["seconds"], result["seconds_of_sizes"]["1 new label"]
    (padded,) = [name for name in seconds if name.startswith("all prompts padded")]
    first, known = seconds["first call"], seconds["again, from disk"]
    fewest, most = result["entries"][0], result["entries"][-1]
    vectors = f"text vectors of {result['labels']} labels"
    return [
        timed(vectors, padded, (seconds[padded], first), "text_side"),
        timed(f"{vectors}, known", "the first call", (first, known), "text_side"),
        timed(f"a new label, cache of {most:,}", f"cache of {fewest:,}", (new[0], new[-1]), "text_side"),
    ]


def loader_ratios(result: dict) -> list[Ratio]:
    rates = {(row["pictures"], row["loader"]): row for row in result["results"]}
    found = []
    for pictures in dict.fromkeys(pictures for pictures, _ in rates):
        usual, ours = (rates[pictures, f"1 process, {way}"] for way in ("resize and crop", "map-style"))
        seconds = 1 / usual["samples_per_second"], 1 / ours["samples_per_second"]
        found.append(
            timed(f"training sample, {pictures}", "resize, then crop", seconds, "loader", ours["times_faster"])
        )
    return found


def crops_ratios(views: dict, labels: dict) -> list[Ratio]:
    """CLIP's view of the proposals, and pseudo labels, beside a loop over crops."""
    name, found = "loop over crops", []
    (loop, *others), (rate, *rates) = views["cost"], labels["rows"]
    for row in others:
        seconds = loop["seconds"], row["seconds"]
        found.append(timed(f"CLIP's view, {row['way']}", name, seconds, "clip_views", row["times_faster_than_loop"]))
    for row in rates:
        seconds = 1 / rate["images_per_second"], 1 / row["images_per_second"]
        computation = f"pseudo labels, {row['way'].rsplit(', ', 1)[1]}"
        found.append(timed(computation, name, seconds, "pseudo_labels", row["times_faster_than_loop"]))
    return found


def ratios(folder: Path) -> list[Ratio]:
    results = {}
    for name in NAMES:
        try:
            results[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--results: {name}.json cannot be read: run its benchmark first") from error
    return [
        *label_map_ratios(results["label_count"]),
        *network_ratios(results["network"], "network", "forward", "zs3"),
        *network_ratios(results["network_compiled"], "network", "compiled forward", "zs3"),
        *network_ratios(results["train_step"], "train_step", "training step, 2 images", "zs3, the same losses"),
        *criterion_ratios(results["criterion"]),
        *text_ratios(results["text_side"]),
        *loader_ratios(results["loader"]),
        *crops_ratios(results["clip_views"], results["pseudo_labels"]),
    ]


def table(found: list[Ratio]) -> str:
    return measuring.table_of(TITLES, [ratio.cells() for ratio in found])


def readme_table(found: list[Ratio]) -> str:
    return measuring.table_of(README_TITLES, [[ratio.computation, *ratio.both()] for ratio in found if ratio.in_readme])


def main() -> None:
    args, _ = read_arguments(RatioArgs)
    found = ratios(Path(args.results))
    print(f"{table(found)}\n{readme_table(found)}", end="")


if __name__ == "__main__":
    run(main)
