"""The tables of `zs3 ablation` as data.

Trainings (`TRAININGS`), ensembles of their evaluations (`ENSEMBLES`), pairs to compare, numbers of the paper.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from configuration_zs3 import Zs3Config
from zs3.scores.means import GeneralizedScores

ENSEMBLE_WEIGHT = Zs3Config.clip_ensemble_weight  # the paper's for COCO-Stuff; models of the recipes have none

# ---- trainings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training: the recipe of its stage, with these flags of train.py.

    unseen_labels: image labels of unseen classes: none, ground_truth, pseudo (from stage 1 of the same seed), or one
        of MADE_LABELS.
    start: the training that gives the initial model; None: none, and the recipe is that of stage 1.
    whole: one stage with the steps of both stages. scripts: as --scripts of `zs3 ablation`.
    """

    title: str
    flags: tuple[str, ...] = ()
    unseen_labels: str = "ground_truth"
    start: str | None = "stage1"
    whole: bool = False
    scripts: str | None = None

    @property
    def labels_folder(self) -> str | None:
        """The folder of its image labels beside the trainings; None: they are not made before the training."""
        is_made = self.unseen_labels == "pseudo" or self.unseen_labels in MADE_LABELS
        return f"{self.unseen_labels}_labels" if is_made else None


MADE_LABELS = {  # flags of benchmarks.made_labels, which changes the true labels
    "shuffled": ("--shuffled", "true"),
    "half_right": ("--precision", "0.5", "--recall", "0.75"),
    "mostly_right": ("--precision", "0.75", "--recall", "0.65"),
}
BARE = ("--prompt_templates", "{}")
LABEL_MAP = ("--label_map_weight", "2")
BEST = (*LABEL_MAP, "--matching", "hybrid")  # as in recipes/scenes_stage2_best.yaml
CE = ("--class_loss", "cross_entropy", "--rank_weight", "0")
CE_KL = ("--rank_weight", "0")
FIRST = {"unseen_labels": "none", "start": None}
CLOSED_SET = "benchmarks.closed_set"  # trains transformers' Mask2Former; not in the package
TRAININGS = {
    "stage1": Training("stage 1 alone", **FIRST),
    "stage1_bare": Training("stage 1 alone, no prompts", BARE, **FIRST),
    # Table 5
    "none": Training("stage 2, no image labels", unseen_labels="none"),
    "pseudo": Training("stage 2, pseudo labels", unseen_labels="pseudo"),
    "ground_truth": Training("stage 2"),
    # Table 6; its last row, with prompts, is Table 5's
    "ce": Training("CE and background", CE),
    "ce_kl": Training("CE, KL", CE_KL),
    "bare_ce": Training("CE and background, no prompts", (*CE, *BARE), start="stage1_bare"),
    "bare_ce_kl": Training("CE, KL, no prompts", (*CE_KL, *BARE), start="stage1_bare"),
    "bare_ce_kl_rank": Training("CE, KL, ranking, no prompts", BARE, start="stage1_bare"),
    "closed": Training("closed: CE and background, joint matching", (*CE, "--matching", "joint"), unseen_labels="none"),
    # what image labels are worth
    "shuffled": Training("stage 2, image labels of other pictures", unseen_labels="shuffled"),
    "half_right": Training("stage 2, half of the image labels right", unseen_labels="half_right"),
    "mostly_right": Training("stage 2, 3 of 4 image labels right", unseen_labels="mostly_right"),
    "label_map_ce": Training("CE and background, label map loss", (*CE, *LABEL_MAP)),
    "label_map_ce_labelled": Training(
        "CE and background, label map loss, labelled pixels alone",
        (*CE, *LABEL_MAP, "--label_map_pixels", "labelled"),
    ),
    # beyond the paper: stage 2 with one change
    "unpaired": Training("unpaired matching", ("--matching", "unpaired")),
    "joint": Training("joint matching", ("--matching", "joint")),
    "hybrid": Training("hybrid matching", ("--matching", "hybrid")),
    "focal": Training("focal mask loss", ("--mask_loss", "focal")),
    "kl_u_p": Training("KL(U || p)", ("--kl", "u_p")),
    "ignored_negative": Training("ignored pixels are negatives", ("--ignored_pixels", "negative")),
    "warm": Training("temperature 0.07 in stage 2", ("--class_temperature", "0.07")),
    "rank_pairs": Training("ranking of 10 cos, mean over pairs", ("--rank_scale", "10", "--rank_norm", "pairs")),
    # doses: KL in Eq. 5 as a multiple of the CE, which keeps its weight; the ranking loss
    "kl_queries": Training("CE, KL as a sum over queries", (*CE_KL, "--class_norm", "queries")),
    "kl_7.67": Training("CE, KL x 7.67", (*CE_KL, "--matched_weight", "0.1154", "--class_weight", "10.4")),
    "rank_7": Training("ranking x 7", ("--rank_weight", "7")),
    "rank_20": Training("ranking x 20", ("--rank_weight", "20")),
    "rank_tau": Training("ranking of cos / 0.01", ("--rank_scale", "100")),
    # not the paper's: a loss on the label map of Eq. 4
    "label_map": Training("label map loss", LABEL_MAP),
    "label_map_labelled": Training(
        "label map loss, labelled pixels alone", (*LABEL_MAP, "--label_map_pixels", "labelled")
    ),
    "best": Training("hybrid matching, label map loss", BEST),
    "best_ce": Training("CE and background, hybrid matching, label map loss", (*CE, *BEST)),
    "best_no_rank": Training("hybrid matching, label map loss, no ranking", (*BEST, *CE_KL)),
    "pseudo_best": Training("hybrid matching, label map loss, pseudo labels", BEST, unseen_labels="pseudo"),
    # what else a user could take
    "mask2former": Training("transformers' Mask2Former", **FIRST, whole=True, scripts=CLOSED_SET),
    "zegformer": Training("ZegFormer-like", ("--class_projection", "linear"), **FIRST, whole=True),
}


# ---- evaluations -------------------------------------------------------------------------------------------


class EnsembleFlags(NamedTuple):
    """The ensemble of an evaluation, as flags of eval.py. chosen: `zs3 ensemble_weight` chooses its weight."""

    title: str
    flags: tuple[str, ...] = ()
    chosen: bool = False


WEIGHT = ("--ensemble_weight", str(ENSEMBLE_WEIGHT))
ENSEMBLES = {
    "off": EnsembleFlags("off", ("--ensemble", "off")),
    "crops": EnsembleFlags("on, crops", ("--ensemble", "crops", *WEIGHT)),
    "single_pass": EnsembleFlags("on, single pass", ("--ensemble", "single_pass", *WEIGHT)),
    "chosen": EnsembleFlags("as chosen by image labels", chosen=True),
    "zegformer": EnsembleFlags(
        "on, crops, w = 2/3, bias 0.1", ("--ensemble", "crops", "--ensemble_weight", "0.6667", "--seen_bias", "0.1")
    ),
}


# ---- the tables --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a table: a training and the ensemble it is evaluated with."""

    training: str  # of TRAININGS
    ensemble: str = "off"  # of ENSEMBLES

    @property
    def title(self) -> str:
        title = TRAININGS[self.training].title
        return title if self.ensemble == "off" else f"{title}, ensemble {ENSEMBLES[self.ensemble].title}"

    @property
    def is_chosen(self) -> bool:
        """Whether `zs3 ensemble_weight` chooses the weight of the ensemble."""
        return ENSEMBLES[self.ensemble].chosen

    @property
    def needs_pseudo_labels(self) -> bool:
        """Whether pseudo labels are needed: for training, or to choose the weight if training had no true labels."""
        labels = TRAININGS[self.training].unseen_labels
        return labels == "pseudo" or (self.is_chosen and labels != "ground_truth")


class Difference(NamedTuple):
    """row - minus, paired by seed."""

    row: Row
    minus: Row
    paper: GeneralizedScores | None = None  # the paper's difference, in percentage points, or None

    @property
    def title(self) -> str:
        return f"{self.row.title} − {self.minus.title}"


class Sample(NamedTuple):
    """What an ablation is evaluated on."""

    seeds: tuple[int, ...]
    label_space: str | None
    split: str


PLANNED = Sample(tuple(range(1, 12)), "scenes:{seed}", "test")  # of docs/evidence_plan.md


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    rows: list[Row]
    differences: list[Difference]
    paper: dict[Row, GeneralizedScores] = field(default_factory=dict)  # the paper's scores of its rows, in percent
    sample: Sample | None = None  # of a plan that named the differences in hIoU before the runs; None: no plan


def gain(before: GeneralizedScores, after: GeneralizedScores) -> GeneralizedScores:
    return GeneralizedScores(*(a - b for a, b in zip(after, before, strict=True)))


# Tables 4 to 6 of the paper, COCO-Stuff, percent. Table 5's row of pseudo labels is Table 4's with the ensemble.
PSEUDO_ENSEMBLE_OFF = GeneralizedScores(37.2, 35.5, 36.4)
TABLE5 = {
    "none": GeneralizedScores(40.1, 25.3, 31.0),
    "pseudo": GeneralizedScores(38.6, 42.0, 40.2),
    "ground_truth": GeneralizedScores(39.0, 52.2, 44.7),
}
TABLE6 = {  # without prompts; the last row with prompts is ground_truth of TABLE5
    "ce": GeneralizedScores(36.7, 35.2, 35.9),
    "ce_kl": GeneralizedScores(31.8, 38.9, 35.0),
    "ce_kl_rank": GeneralizedScores(38.4, 50.1, 43.5),
}


def make_tables(clip: bool, matching: str) -> dict[str, Table]:
    """All tables. clip: False if text vectors are given; then no row has names without prompts, pseudo labels or an
    ensemble. matching: of the recipe of stage 2."""
    tables = {"table4": table4(), "table5": table5(), "table6": table6(clip), **beyond_the_paper(matching)}
    tables |= {
        "anchors": anchors(),
        "doses": doses(),
        "ensemble_weight": ensemble_weight(),
        "best": best(clip),
        "parts": parts(),
        "comparison": comparison(),
    }
    tables["confirmatory"] = confirmatory(tables["table6"], clip)
    if clip:
        return tables
    del tables["comparison"]  # most rows of this table need a CLIP
    reduced = {name: without_clip(table) for name, table in tables.items()}
    return {name: table for name, table in reduced.items() if table.differences}


def without_clip(table: Table) -> Table:
    def kept(row: Row) -> bool:
        return TRAININGS[row.training].unseen_labels != "pseudo" and row.ensemble == "off"

    differences = [pair for pair in table.differences if kept(pair.row) and kept(pair.minus)]
    return replace(table, rows=[row for row in table.rows if kept(row)], differences=differences)


def table4() -> Table:
    names = ("stage1", "none", "pseudo", "ground_truth")
    return Table(
        "Table 4: the ensemble with CLIP",
        f"The weight is {ENSEMBLE_WEIGHT}, the paper's for COCO-Stuff. The paper has one pair, of the model trained "
        "with pseudo labels; here every training is compared with the sign of that pair. The last differences are "
        "those of Table 5 with the ensemble on, as the paper probably has it.",
        [Row(name, ensemble) for name in names for ensemble in ("off", "crops", "single_pass")],
        [
            *(
                Difference(Row(name, ensemble), Row(name), gain(PSEUDO_ENSEMBLE_OFF, TABLE5["pseudo"]))
                for name in names
                for ensemble in ("crops", "single_pass")
            ),
            *table5_differences("crops"),
        ],
        {Row("pseudo"): PSEUDO_ENSEMBLE_OFF, Row("pseudo", "crops"): TABLE5["pseudo"]},
    )


def ensemble_weight() -> Table:
    names = ("stage1", "none", "pseudo", "ground_truth")
    ours = ("pseudo_best", "best")
    return Table(
        "The weight of the ensemble, chosen without unseen masks or validation images",
        "`zs3 ensemble_weight` chooses a weight, or no ensemble, on training images and their image labels of unseen "
        "classes: the true ones for models whose training had them, pseudo labels for all others. So the choice uses "
        "labels of unseen classes even where training had none: with it these models are transductive, too.",
        [
            *(Row(name, ensemble) for name in names for ensemble in ("off", "crops", "chosen")),
            *(Row(name, ensemble) for name in ours for ensemble in ("off", "chosen")),
        ],
        [
            *(Difference(Row(name, "chosen"), Row(name)) for name in (*names, *ours)),
            *(Difference(Row(name, "chosen"), Row(name, "crops")) for name in names),
            *(Difference(Row(name, "chosen"), Row("stage1", "chosen")) for name in ("pseudo", "pseudo_best")),
        ],
    )


PROBABLY_ON = (
    "The ensemble is off here. The paper's row of pseudo labels is that of its Table 1, with the ensemble; the other "
    "rows of its Tables 5 and 6 probably have it, too."
)


def table5() -> Table:
    return Table(
        "Table 5: image labels of unseen classes in training",
        PROBABLY_ON,
        [Row(name) for name in TABLE5],
        table5_differences("off"),
        {Row(name): scores for name, scores in TABLE5.items()},
    )


def table5_differences(ensemble: str) -> list[Difference]:
    pairs = (("pseudo", "none"), ("ground_truth", "none"), ("pseudo", "ground_truth"))
    return [Difference(Row(a, ensemble), Row(b, ensemble), gain(TABLE5[b], TABLE5[a])) for a, b in pairs]


def table6(clip: bool) -> Table:
    if clip:
        steps = {f"bare_{name}": scores for name, scores in TABLE6.items()} | {"ground_truth": TABLE5["ground_truth"]}
        note = "The rows without prompts have a stage 1 without prompts, too; 'stage 2' has all components."
    else:
        steps = {"ground_truth" if name == "ce_kl_rank" else name: scores for name, scores in TABLE6.items()}
        note = "The text vectors are ready made, so the paper's last step, prompts, is not among the rows."
    names = list(steps)
    pairs = [*zip(names[1:], names, strict=False), (names[-1], names[0]), (names[-1], "closed")]
    return Table(
        "Table 6: the components",
        f"{PROBABLY_ON} 'Closed' is stage 1 trained on for as many steps; the paper has no such row. {note}",
        [Row("closed"), *map(Row, names)],
        [
            Difference(Row(name), Row(minus), gain(steps[minus], steps[name]) if minus in steps else None)
            for name, minus in dict.fromkeys(pairs)
        ],
        {Row(name): scores for name, scores in steps.items()},
    )


def confirmatory(table6: Table, clip: bool) -> Table:
    """The contrasts of docs/evidence_plan.md."""
    *steps, full = (pair for pair in table6.differences if pair.minus != Row("closed"))
    ensemble = Difference(
        Row("ground_truth", "crops"), Row("ground_truth"), gain(PSEUDO_ENSEMBLE_OFF, TABLE5["pseudo"])
    )
    contrasts = [*steps, *([ensemble] if clip else []), full, Difference(Row("best"), Row("best_ce"))]
    return Table(
        "The confirmatory contrasts",
        "They were named before the runs (docs/evidence_plan.md). The paper's ensemble is that of a model with pseudo "
        "labels.",
        list(dict.fromkeys(row for contrast in contrasts for row in (contrast.minus, contrast.row))),
        contrasts,
        table6.paper,
        sample=PLANNED if clip else None,
    )


CHOICE_NOTE = "A row differs from 'stage 2', the recipe of stage 2, as its name says; the ensemble is off."


def beyond_the_paper(matching: str) -> dict[str, Table]:
    matchings = tuple(name for name in ("unpaired", "joint", "hybrid") if name != matching)
    changed = {
        "matching": (f"Matching of labels and masks; the paper's is unpaired, stage 2 has {matching}", matchings),
        "mask_loss": ("Mask loss; the paper's is focal, the recipes have BCE", ("focal",)),
        "kl": ("Direction of the KL; as printed it is KL(p || U)", ("kl_u_p",)),
        "ignored_pixels": ("Ignored pixels; the paper leaves them out of the mask losses", ("ignored_negative",)),
        "temperature": ("Temperature; the recipes have 0.01", ("warm",)),
        "ranking": ("Ranking loss; as printed, on cosines, divided by the positives", ("ce_kl", "rank_pairs")),
    }
    return {
        key: Table(
            title,
            CHOICE_NOTE,
            [Row("ground_truth"), *map(Row, names)],
            [Difference(Row(name), Row("ground_truth")) for name in names],
        )
        for key, (title, names) in changed.items()
    }


def anchors() -> Table:
    labels = ("shuffled", "half_right", "mostly_right")
    control = ("label_map_ce", "label_map_ce_labelled", "best_ce")
    return Table(
        "What image labels and the label map loss are worth",
        "The labels of the second to fourth row are made from the true ones (`benchmarks.made_labels`): those of other "
        "pictures; precision 50 % and recall 75 %, as pseudo labels of all proposals have them; precision 75 % and "
        "recall 65 %, as the default has them. The label map loss is given to both class losses.",
        [Row(name) for name in ("none", *labels, "pseudo", "ground_truth", "ce", "closed", *control)]
        + [Row(name) for name in ("label_map", "label_map_labelled", "best")],
        [
            *(Difference(Row(name), Row("none")) for name in (*labels, "pseudo", "ground_truth")),
            *(Difference(Row(name), Row("ground_truth")) for name in (*labels, "pseudo")),
            *(Difference(Row(name), Row("ce")) for name in control),
            Difference(Row("label_map"), Row("label_map_ce")),
            Difference(Row("label_map_labelled"), Row("label_map_ce_labelled")),
            Difference(Row("best"), Row("best_ce")),
            Difference(Row("best"), Row("closed")),
        ],
    )


def doses() -> Table:
    kl, ranking = ("kl_queries", "kl_7.67"), ("rank_7", "rank_20", "rank_tau")
    return Table(
        "The doses of KL and of the ranking loss",
        "With Eq. 5's means over groups the KL term has 0.67 times the weight of the CE. With the sum over queries, as "
        "in Eq. 1, it has about 1.2 times its weight here (16 queries), and 7.67 times with 100 queries on COCO-Stuff. "
        "The dose of Eq. 6 (docs/method.md) is 10.2 on COCO-Stuff, and about 1.6 with these 24 names.",
        [Row("ce"), Row("ce_kl"), *map(Row, kl), Row("ground_truth"), *map(Row, ranking)],
        [
            *(Difference(Row(name), Row("ce")) for name in ("ce_kl", *kl)),
            *(Difference(Row(name), Row("ce_kl")) for name in kl),
            *(Difference(Row(name), Row("ce_kl")) for name in ("ground_truth", *ranking)),
        ],
    )


def best(clip: bool) -> Table:
    baseline = "bare_ce" if clip else "ce"  # Table 6, row 1
    pairs = [
        *(("best", name) for name in ("ground_truth", baseline, "closed", "stage1")),
        *(("pseudo_best", name) for name in ("pseudo", "none", "best")),
    ]
    names = ["stage1", "closed", baseline, "none", "pseudo", "ground_truth", "best", "pseudo_best"]
    return Table(
        "Hybrid matching and the label map loss",
        "Neither is the paper's; together (`label_map_weight` 2 in place of 0) they are "
        "`recipes/scenes_stage2_best.yaml`. Stage 1 alone has fewer steps than the other rows. The ensemble is off.",
        [Row(name) for name in names],
        [Difference(Row(name), Row(minus)) for name, minus in pairs],
    )


def parts() -> Table:
    pairs = [
        *((name, "ground_truth") for name in ("hybrid", "label_map", "label_map_labelled")),
        *(("best", name) for name in ("hybrid", "label_map")),
        ("best_no_rank", "best"),
    ]
    return Table(
        "The parts of hybrid matching and the label map loss",
        CHOICE_NOTE,
        [Row(name) for name in ("ground_truth", "hybrid", "label_map_labelled", "label_map", "best", "best_no_rank")],
        [Difference(Row(name), Row(minus)) for name, minus in pairs],
    )


def comparison() -> Table:
    theirs = [Row("mask2former"), Row("closed", "crops"), Row("zegformer", "zegformer")]
    ours = [Row("pseudo"), Row("pseudo", "crops"), Row("pseudo_best"), Row("ground_truth"), Row("best")]
    return Table(
        "What else a user could take",
        "All rows have the same number of steps and the same data and augmentation; where they are in one stage, the "
        "learning rate decays once. The first three rows are inductive: they know nothing of unseen classes but, at "
        "inference, their names. Our rows have image labels, pseudo or true, and the ensemble off but for one row, "
        "which is the paper's own method. Transformers' Mask2Former has its own losses and no "
        "name for an unseen class: its mIoU(U) is 0 by construction, and differences of mIoU(U) and hIoU to it say no "
        "more than that. 'Closed' with the ensemble is zsseg-like (Xu et al. 2021: a background embedding, w = 0.8). "
        "'ZegFormer-like' (Ding et al. 2022) has a linear class projection, its ensemble's exponents of 2/3 and 1/3, "
        "and 0.1 off the scores of seen classes; it lacks the averaging of CLIP's scores over seen classes. Both are "
        "stand-ins in this code, not those projects.",
        [*theirs, *ours],
        [Difference(row, minus) for row in ours for minus in theirs],
    )
