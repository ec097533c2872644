"""The tables of zs3.ablation as data: trainings (`ROWS`), how a model is looked at (`VIEWS`), which pairs are compared,
and what the paper has there."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from configuration_zs3 import Zs3Config
from zs3.evaluation import GeneralizedScores

ENSEMBLE_WEIGHT = Zs3Config.clip_ensemble_weight  # the paper's for COCO-Stuff; the recipes' models have none

# ---- the rows: trainings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training: flags of train.py beside the recipe of its stage.

    start: the row whose model it starts from; None: it has the recipe of stage 1.
    whole: it has the steps of both stages in one. scripts: as --scripts of zs3.ablation.
    """

    title: str
    flags: tuple[str, ...] = ()
    start: str | None = "stage1"
    pseudo_labels: bool = False  # is told those made with the same seed's stage 1
    whole: bool = False
    scripts: str | None = None


BARE = ("--prompt_templates", "{}")
LABEL_MAP = ("--label_map_weight", "2")
BEST = (*LABEL_MAP, "--matching", "hybrid")  # that of recipes/scenes_stage2_best.yaml
CE = ("--class_loss", "cross_entropy", "--rank_weight", "0")
CE_KL = ("--rank_weight", "0")
ROWS = {
    "stage1": Row("stage 1", start=None),
    "stage1_bare": Row("stage 1, names without prompts", BARE, start=None),
    # Table 5
    "none": Row("no unseen labels", ("--unseen_labels", "none")),
    "pseudo": Row("pseudo unseen labels", pseudo_labels=True),
    "ground_truth": Row("ground-truth unseen labels"),
    # Table 6: all of them with ground-truth unseen labels; with prompts, the last one is Table 5's
    "ce": Row("CE and background", CE),
    "ce_kl": Row("CE, KL", CE_KL),
    "bare_ce": Row("CE and background", (*CE, *BARE), "stage1_bare"),
    "bare_ce_kl": Row("CE, KL", (*CE_KL, *BARE), "stage1_bare"),
    "bare_ce_kl_rank": Row("CE, KL, ranking", BARE, "stage1_bare"),
    # beyond the paper: one choice of the last row changed
    "closed": Row(
        "closed: CE and background, seen labels only", ("--unseen_labels", "none", *CE, "--matching", "joint")
    ),
    "joint": Row("joint matching", ("--matching", "joint")),
    "hybrid": Row("hybrid matching", ("--matching", "hybrid")),
    "focal": Row("focal mask loss", ("--mask_loss", "focal")),
    "kl_u_p": Row("KL(U || p)", ("--kl", "u_p")),
    "ignored_negative": Row("ignored pixels are negatives", ("--ignored_pixels", "negative")),
    "warm": Row("temperature 0.07 in stage 2", ("--class_temperature", "0.07")),
    "rank_pairs": Row("ranking of 10 cos, mean over pairs", ("--rank_scale", "10", "--rank_norm", "pairs")),
    # not the paper's: a loss on the label map of Eq. 4
    "label_map": Row("with the label map loss", LABEL_MAP),
    "label_map_labelled": Row(
        "with the label map loss, labelled pixels alone", (*LABEL_MAP, "--label_map_pixels", "labelled")
    ),
    "best": Row("best", BEST),
    "pseudo_best": Row("best, pseudo unseen labels", BEST, pseudo_labels=True),
    # what else a user could take
    "mask2former": Row(
        "transformers' Mask2Former, seen classes only", start=None, whole=True, scripts="benchmarks.closed_set"
    ),
    "zegformer": Row("ZegFormer-like", ("--class_projection", "linear"), start=None, whole=True),
}


class View(NamedTuple):
    """How a model is looked at: flags of eval.py."""

    title: str
    flags: tuple[str, ...]


WEIGHT = ("--ensemble_weight", str(ENSEMBLE_WEIGHT))
VIEWS = {  # lazy is crops, to the pixel
    "off": View("off", ("--ensemble", "off")),
    "crops": View("on, crops", ("--ensemble", "crops", *WEIGHT)),
    "single_pass": View("on, single pass", ("--ensemble", "single_pass", *WEIGHT)),
    "zegformer": View(
        "on, crops, w = 2/3, bias 0.1", ("--ensemble", "crops", "--ensemble_weight", "0.6667", "--seen_bias", "0.1")
    ),
}


# ---- the tables --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a table: a training and the ensemble it is evaluated with."""

    row: str  # of ROWS
    view: str = "off"  # of VIEWS


class Difference(NamedTuple):
    """line - minus, paired by seed."""

    line: Line
    minus: Line
    paper: GeneralizedScores | None = None  # the paper's difference, in percentage points, where it has one

    @property
    def title(self) -> str:
        row, other = (ROWS[line.row].title for line in (self.line, self.minus))
        view, its = (VIEWS[line.view].title for line in (self.line, self.minus))
        if row == other:
            return f"{row}: ensemble {view} − {its}"
        return f"{row} − {other}" if view == its == "off" else f"{row}, ensemble {view} − {other}, ensemble {its}"


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    lines: list[Line]
    differences: list[Difference]
    paper: dict[Line, GeneralizedScores] = field(default_factory=dict)  # where the paper has such a line; percent


def gain(before: GeneralizedScores, after: GeneralizedScores) -> GeneralizedScores:
    return GeneralizedScores(*(a - b for a, b in zip(after, before, strict=True)))


# Tables 4 to 6 of the paper, COCO-Stuff, percent. Table 5's pseudo labels are Table 4's model with the ensemble on.
PAPER_NONE = GeneralizedScores(40.1, 25.3, 31.0)
PAPER_PSEUDO = GeneralizedScores(38.6, 42.0, 40.2)
PAPER_GROUND_TRUTH = GeneralizedScores(39.0, 52.2, 44.7)
PAPER_PSEUDO_ENSEMBLE_OFF = GeneralizedScores(37.2, 35.5, 36.4)
PAPER_CE = GeneralizedScores(36.7, 35.2, 35.9)
PAPER_CE_KL = GeneralizedScores(31.8, 38.9, 35.0)
PAPER_CE_KL_RANK = GeneralizedScores(38.4, 50.1, 43.5)


def make_tables(clip: bool) -> dict[str, Table]:
    """clip: False where text vectors are ready made: there are no names without prompts, no pseudo labels, and no
    ensemble."""
    tables = {"table4": table4(), "table5": table5(), "table6": table6(clip), **beyond_the_paper()}
    tables |= {"best": best(clip), "comparison": comparison()}
    if clip:
        return tables
    reduced = {name: without_clip(table) for name, table in tables.items()}
    return {name: table for name, table in reduced.items() if table.differences}


def without_clip(table: Table) -> Table:
    def kept(line: Line) -> bool:
        return not ROWS[line.row].pseudo_labels and line.view == "off"

    differences = [pair for pair in table.differences if kept(pair.line) and kept(pair.minus)]
    return replace(table, lines=[line for line in table.lines if kept(line)], differences=differences)


def table4() -> Table:
    rows = ("stage1", "none", "pseudo", "ground_truth")
    return Table(
        "Table 4: the ensemble with CLIP",
        f"The weight is {ENSEMBLE_WEIGHT}, the paper's for COCO-Stuff. The paper has one pair, of the model trained "
        "with pseudo labels; its sign is asked of every training here.",
        [Line(row, view) for row in rows for view in ("off", "crops", "single_pass")],
        [
            Difference(Line(row, view), Line(row), gain(PAPER_PSEUDO_ENSEMBLE_OFF, PAPER_PSEUDO))
            for row in rows
            for view in ("crops", "single_pass")
        ],
        {Line("pseudo"): PAPER_PSEUDO_ENSEMBLE_OFF, Line("pseudo", "crops"): PAPER_PSEUDO},
    )


def table5() -> Table:
    paper = {"none": PAPER_NONE, "pseudo": PAPER_PSEUDO, "ground_truth": PAPER_GROUND_TRUTH}
    return Table(
        "Table 5: what training is told of unseen classes",
        "The ensemble is off here. In the paper it is on, at least in the row of pseudo labels: that one is Table 4's "
        "with the ensemble.",
        [Line(row) for row in paper],
        [
            *(Difference(Line(row), Line("none"), gain(PAPER_NONE, paper[row])) for row in ("pseudo", "ground_truth")),
            Difference(Line("pseudo"), Line("ground_truth"), gain(PAPER_GROUND_TRUTH, PAPER_PSEUDO)),
        ],
        {Line(row): scores for row, scores in paper.items()},
    )


def table6(clip: bool) -> Table:
    steps = {"ce": PAPER_CE, "ce_kl": PAPER_CE_KL, "ce_kl_rank": PAPER_CE_KL_RANK}
    if clip:
        steps = {f"bare_{row}": scores for row, scores in steps.items()} | {"ground_truth": PAPER_GROUND_TRUTH}
        note = "The rows without prompts have a stage 1 without prompts, too."
    else:
        steps = {"ground_truth" if row == "ce_kl_rank" else row: scores for row, scores in steps.items()}
        note = "The text vectors are ready made: there is no row without prompts, and the paper's has them last."
    rows = list(steps)
    pairs = [*zip(rows[1:], rows, strict=False), (rows[-1], rows[0]), (rows[-1], "closed")]
    return Table(
        "Table 6: the components",
        "All rows but 'closed' are told ground-truth unseen image labels, and the ensemble is off. 'Closed' is stage 1 "
        f"trained on for as many steps; the paper has no such row. {note}",
        [Line("closed"), *map(Line, rows)],
        [
            Difference(Line(row), Line(minus), gain(steps[minus], steps[row]) if minus in steps else None)
            for row, minus in dict.fromkeys(pairs)
        ],
        {Line(row): scores for row, scores in steps.items()},
    )


def beyond_the_paper() -> dict[str, Table]:
    changed = {
        "matching": ("Matching of labels and masks; the paper's is unpaired", ("joint", "hybrid")),
        "mask_loss": ("Mask loss; the recipes have BCE", ("focal",)),
        "kl": ("Direction of the KL; as printed it is KL(p || U)", ("kl_u_p",)),
        "ignored_pixels": ("Ignored pixels; the paper leaves them out of the mask losses", ("ignored_negative",)),
        "temperature": ("Temperature; the recipes have 0.01", ("warm",)),
        "ranking": ("Ranking loss; as printed, on cosines, divided by the positives", ("rank_pairs",)),
    }
    return {
        name: Table(
            title,
            "One choice changed in the recipe of stage 2, with ground-truth unseen labels; the ensemble is off.",
            [Line("ground_truth"), *map(Line, rows)],
            [Difference(Line(row), Line("ground_truth")) for row in rows],
        )
        for name, (title, rows) in changed.items()
    }


def best(clip: bool) -> Table:
    baseline = "bare_ce" if clip else "ce"  # Table 6, row 1
    pairs = [
        *(("best", row) for row in ("ground_truth", baseline, "closed", "stage1")),
        *((row, "ground_truth") for row in ("hybrid", "label_map", "label_map_labelled")),
        *(("best", row) for row in ("hybrid", "label_map")),
        *(("pseudo_best", row) for row in ("pseudo", "none", "best")),
    ]
    rows = ["stage1", "closed", baseline, "none", "pseudo", "ground_truth"]
    rows += ["hybrid", "label_map_labelled", "label_map", "best", "pseudo_best"]
    return Table(
        "Better than the paper's",
        "'Best' has hybrid matching and the loss on the label map (`label_map_weight` 2 in place of 0), which are not "
        "the paper's. Rows that say nothing of unseen labels are told those of the ground truth; the ensemble is off.",
        [Line(row) for row in rows],
        [Difference(Line(row), Line(minus)) for row, minus in pairs],
    )


def comparison() -> Table:
    theirs = [Line("mask2former"), Line("closed", "crops"), Line("zegformer", "zegformer")]
    ours = [Line("pseudo"), Line("ground_truth"), Line("best")]
    return Table(
        "What else a user could take",
        "Everything has the same number of steps, data and augmentation. Transformers' Mask2Former has its own losses "
        "and no name for an unseen class, so its mIoU(U) is 0. 'Closed' with the ensemble is zsseg-like (Xu et al. "
        "2021: a background embedding, seen labels only, w = 0.8). 'ZegFormer-like' (Ding et al. 2022) has a linear "
        "class projection, its ensemble's exponents of 2/3 and 1/3, and 0.1 off the scores of seen classes; it lacks "
        "the averaging of CLIP's scores over seen classes. Both are stand-ins in this code, not those projects.",
        [*theirs, *ours],
        [Difference(line, minus) for line in ours for minus in theirs],
    )
