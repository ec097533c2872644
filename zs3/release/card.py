"""The card of a released checkpoint: a template of hub_cards/, filled from the checkpoint and from result files.

Every score in the tables and in the model-index of a card comes from a result file of eval.py.

A template is Markdown for Jinja, and `model_card` fills its slots. `{{ card_data }}` belongs in the front matter, which
the Hub reads. The template gives the other fields of the front matter.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2.meta  # a dependency of torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig
from typing_extensions import TypedDict

from configuration_zs3 import among, once, one_line
from files_zs3 import read_text
from zs3.command_line import InputError, printable, shown
from zs3.convert.archives import ARCHIVES
from zs3.evaluation.report import candidates_in_words, ensemble_encoder, quality_in_words
from zs3.evaluation.result_types import Result
from zs3.label_space import BENCHMARKS, LabelSpace, benchmark_spaces, is_hub_id
from zs3.scores.means import SCORES
from zs3.tables import markdown, markdown_table, percent
from zs3.training.folder import read_recipe
from zs3.typed_json import check_content

IMAGE_LABELS = {  # of unseen classes in training
    "none": "none; training did not know these names",
    "pseudo": "pseudo labels, which CLIP estimated for training images; never a mask",
    "captions": "their names in captions of the training images; never a mask",
    "ground_truth": "ground truth, which says which of them an image shows; never a mask",
    None: "not known",
}
SETTINGS = {
    "gzs3": "names of seen and unseen classes are given, and the pixels of both count",
    "zs3": "names of unseen classes alone are given, and only their pixels count",
    "ovs": "names of any dataset are given; the list below says of how many of them training saw masks",
}
NEEDED_SLOTS = ("card_data", "results")
DRAWN = ("scenes", "scenes_90")  # label spaces of scenes, which this project draws
FIRST_EDITION = "916a090059e6b65d45aa323c04c8ad677792260bf57a741570b02538d5afceb3"  # sha256 of their first label space
RECIPE_FIELDS = (
    "unseen_labels",
    "max_steps",
    "batch_size",
    "learning_rate",
    "seed",
    "class_loss",
    "matching",
    "mask_loss",
    "rank_weight",
    "label_map_weight",
)
CITATION = """```bibtex
@misc{dao2023class,
  title  = {Class Enhancement Losses with Pseudo Labels for Zero-shot Semantic Segmentation},
  author = {Dao, Son Duy and Shi, Hengcan and Phung, Dinh and Cai, Jianfei},
  year   = {2023},
  eprint = {2301.07336},
  archivePrefix = {arXiv},
}
```"""


def model_card(
    template: Path,
    repo_id: str,
    config: PreTrainedConfig,
    checkpoint_sha256: str,
    recipes: Sequence[dict],
    results: Sequence[Result],
    code_sha256: str | None = None,
) -> str:
    """README.md of the checkpoint's Hub repository.

    config: of the checkpoint. recipes: of its training stages in order, as train.py writes them.
    results: of eval.py for this checkpoint. code_sha256: of the code in the repository.
    """
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=starts(recipes) or None,
        model_name=name if results else None,
        eval_results=[entry for result in results for entry in model_index(result)] or None,
    )
    label_space = space_with_seen(template.stem, config.seen_class_names) if template.stem in BENCHMARKS else None
    filled = {
        "name": name,
        "status": status(config, recipes, results),
        "usage": usage(repo_id, config),
        "training": training(config, label_space, results),
        "results": tables(results, checkpoint_sha256, code_sha256) if results else "",
        "runs": runs(recipes),
        "citation": CITATION,
        "data_licence": ARCHIVES[template.stem].licence if template.stem in ARCHIVES else "",
    }
    try:
        card = str(ModelCard.from_template(data, template_path=str(template), **filled))
    except (jinja2.TemplateError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"template {template} cannot be filled: {one_line(error)}") from error
    check_slots(template)
    return re.sub(r"\n{3,}", "\n\n", card)  # an empty slot leaves an empty paragraph


def check_slots(template: Path) -> None:
    """Raises InputError if a template lacks the slots that show scores to readers and to the Hub."""
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(read_text(template)))
    missing = [f"{{{{ {name} }}}}" for name in NEEDED_SLOTS if name not in asked]
    if missing:
        raise InputError(
            f"template {template} lacks {' and '.join(missing)}: {{{{ card_data }}}} belongs into its front matter, "
            "{{ results }} below it"
        )


# ---- the checkpoint ----------------------------------------------------------------------------------------


def space_with_seen(template: str, seen: Sequence[str] | None) -> LabelSpace | None:
    """The label space of a benchmark's template, with the split that has these seen classes; None: no split has.

    seen None: not known; then it is the benchmark's own split.
    """
    benchmarks = DRAWN if template in DRAWN else (template,)
    spaces = [space for benchmark in benchmarks for space in benchmark_spaces(benchmark)]
    if seen is None:
        return spaces[0]
    return next((space for space in spaces if all(among(space.seen, seen)) and all(among(seen, space.seen))), None)


def status(config: PreTrainedConfig, recipes: Sequence[dict], results: Sequence[Result]) -> str:
    """A sentence on a missing training or evaluation. Empty if there are results."""
    if results:
        return ""
    if config.seen_class_names is None and not recipes:
        return "**Not trained yet**, as far as the checkpoint says: its label maps are random. See below how to train."
    return "**Trained, not evaluated yet**: there is no result file for these weights. See below how to evaluate."


def usage(repo_id: str, config: PreTrainedConfig) -> str:
    labels = json.dumps(example_labels(config), ensure_ascii=False)
    return f"""```python
from transformers import pipeline

segment = pipeline(model="{repo_id}", trust_remote_code=True)
result = segment("picture.jpg", candidate_labels={labels}, output="map")  # {{"segmentation": (H, W), "labels": ...}}
```"""


def example_labels(config: PreTrainedConfig) -> list[str]:
    """Two labels that the checkpoint can segment."""
    return (config.class_names or config.seen_class_names or ["sky", "grass"])[:2]


def training(config: PreTrainedConfig, label_space: LabelSpace | None, results: Sequence[Result]) -> str:
    """A list: classes with masks in training, unseen names, image labels, possible labels."""
    seen = config.seen_class_names
    if label_space is not None:
        unseen = label_space.unseen
    else:  # a result with --without lacks some names
        names = [name for result in results if result["setting"] != "ovs" for name in result["unseen"]]
        unseen = once(names)
    if config.text_config is not None:
        names = "any names: the text tower is part of the checkpoint"
    else:
        names = f"the {len(config.class_names or [])} names stored in the checkpoint; it has no text tower"
    # Older code beside a checkpoint (--trust_remote_code) does not know these two.
    measured = (getattr(config, name, None) for name in ("image_label_precision", "image_label_recall"))
    quality = quality_in_words(*measured)
    quality = f" (in the last training that had some: {quality})" if quality else ""
    lines = [
        f"- **Masks of {len(seen)} classes** were seen in training: {markdown(', '.join(seen))}."
        if seen is not None
        else "- **Which masks were seen in training** is not known: no zero-shot claim can be made.",
        f"- **Unseen names** of the benchmark ({len(unseen)}): {markdown(', '.join(unseen))}." if unseen else "",
        f"- **Image labels of unseen names**: {IMAGE_LABELS[config.unseen_labels]}{quality}.",
        f"- **Names that can be asked for**: {names}.",
    ]
    return "\n".join(line for line in lines if line)


class Recipe(TypedDict, total=False):
    """The fields of recipe.yaml that a card reads."""

    init_from: str | None
    proposals: str | None
    backbone: str | None
    encoder: str | None


def recipes_of(model: Path) -> list[dict]:
    """The recipes of the trainings that led to RUN/final, in order; without those that are not found."""
    found: list[dict] = []
    folder: Path | None = model.resolve()
    while folder is not None and folder.name == "final" and (folder.parent / "recipe.yaml").is_file():
        path = folder.parent / "recipe.yaml"
        recipe = read_recipe(path)
        check_content(recipe, Recipe, path, "recipe of a run", "move it away")
        if recipe in found:
            raise InputError(f"{shown(path)} starts from itself: move it away")
        found.insert(0, recipe)
        folder = Path(recipe["init_from"]).resolve() if recipe.get("init_from") else None
    return found


def starts(recipes: Sequence[dict]) -> list[str]:
    """Hub ids of the checkpoints that the first stage started from."""
    given = [recipe.get(name) for recipe in recipes for name in ("proposals", "backbone", "encoder")]
    return list(dict.fromkeys(name for name in given if name and is_hub_id(name) and not Path(name).exists()))


def runs(recipes: Sequence[dict]) -> str:
    """The flags of each stage, without paths."""
    if not recipes:
        return "The flags of the run that made these weights are not known here: no recipe.yaml beside the checkpoint."
    lines = []
    for stage, recipe in enumerate(recipes, start=1):
        flags = {name: recipe[name] for name in RECIPE_FIELDS if name in recipe}
        if flags.get("unseen_labels") not in (None, "none", "ground_truth", "masks"):
            flags["unseen_labels"] = "pseudo labels"  # the flag is a folder
        text = markdown(", ".join(f"{name} {value}" for name, value in flags.items()))
        lines.append(f"- Stage {stage} of {len(recipes)}: {text}.")
    if recipes[0].get("init_from"):
        lines.insert(0, "- Before: a run whose recipe is not known here.")
    return "These weights were made with:\n\n" + "\n".join(lines)


# ---- results -----------------------------------------------------------------------------------------------


def model_index(result: Result) -> list[EvalResult]:
    """The scores of one result file in the form of the Hub, in [0, 1]."""
    stamps = ("setting", "absent", "calibration", "num_images", "split_images", "label_space_sha256", "split_sha256")
    protocol = {"candidates": candidates_in_words(result), "without": result["without"] or None}
    protocol |= {"ensemble": ensemble(result), **{name: result[name] for name in stamps}}
    marks = [*([images(result)] if is_partial(result) else []), *deviations(result), f"ensemble {ensemble(result)}"]
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="zero-shot semantic segmentation",
            dataset_type=result["dataset"],
            dataset_name=data_name(result),
            dataset_split=result["split"],
            dataset_config=result["setting"],
            metric_type=name,
            metric_name=", ".join([title, *marks]),
            metric_value=result[name],
            metric_args={**protocol, "interval_95": result["confidence_intervals"].get(name)},
        )
        for name, title in SCORES.items()
        if result.get(name) is not None
    ]


def data_name(result: Result) -> str:
    synthetic = {FIRST_EDITION, *(space.sha256 for name in DRAWN for space in benchmark_spaces(name))}
    return f"{result['dataset']} (synthetic)" if result["label_space_sha256"] in synthetic else result["dataset"]


def is_partial(result: Result) -> bool:
    return result["num_images"] < result["split_images"]


def images(result: Result) -> str:
    of = f" of {result['split_images']:,}" if is_partial(result) else ""
    return f"{result['num_images']:,}{of} images"


def deviations(result: Result) -> list[str]:
    """The choices of a row that change scores compared with the plain setting."""
    without, calibration = result["without"], result["calibration"]
    choices = [f"without {', '.join(map(repr, without))}"] if without else []
    if calibration["seen_bias_chosen"] != "none":
        how = re.sub(r" \(.*\)", "", calibration["seen_bias_chosen"])  # the protocol of the row has the names
        choices.append(f"bias {calibration['seen_bias']:.3g} ({how})")
    return choices


def ensemble(result: Result) -> str:
    view, weight, encoder = result["clip_ensemble"], result["clip_ensemble_weight"], ensemble_encoder(result)
    of = "" if encoder is None else f" of {markdown(encoder)}"
    return "off" if view == "off" else f"{view}{of}, w = {weight}"


def tables(results: Sequence[Result], checkpoint_sha256: str, code_sha256: str | None = None) -> str:
    """Tables of scores with intervals, the protocol of each row, and IoUs of single classes; percent."""
    settings = dict.fromkeys(result["setting"] for result in results)
    text = "; ".join(f"{setting}: {SETTINGS[setting]}" for setting in settings)
    text += ". " + " ".join(exceptions(results))
    titles = {name: title for name, title in SCORES.items() if any(r.get(name) is not None for r in results)}
    rows = []
    for row, result in enumerate(results, start=1):
        data = markdown(f"{data_name(result)}, {result['split']}, {images(result)}")
        setting = markdown(", ".join([result["setting"], *deviations(result)]))
        intervals = result["confidence_intervals"]
        scores = [score(result.get(name), intervals.get(name, [None, None])) for name in titles]
        rows.append([str(row), data, setting, ensemble(result), *scores])
    lines = [f"Percent; in brackets 95 % intervals (bootstrap over images). {text.strip()}\n"]
    lines += markdown_table(["", "data", "setting", "ensemble with CLIP", *titles.values()], rows)
    lines += ["", f"All rows are of these weights (sha256 `{checkpoint_sha256}`).\n"]
    others = [str(row) for row, r in enumerate(results, start=1) if r.get("code_sha256") != code_sha256]
    if code_sha256 is not None and others:
        lines[-1] = lines[-1].rstrip() + f" Evaluated with other code than lies here: row {', '.join(others)}.\n"
    lines += [f"{row}. {origin(result)}" for row, result in enumerate(results, start=1)]
    for row, result in enumerate(results, start=1):
        bold = "" if result["setting"] == "ovs" else ", unseen ones in bold"
        lines += ["", f"<details><summary>Row {row}: IoU of each class{bold}</summary>\n"]
        lines += [per_class(result), "\n</details>"]
    return "\n".join(lines)


def exceptions(results: Sequence[Result]) -> list[str]:
    """The sentences that explain the words of `deviations` and `images`."""
    biased = any(result["calibration"]["seen_bias"] for result in results)
    needed = {
        "Names after `without` are not given, and their pixels do not count.": any(r["without"] for r in results),
        "A `bias` is taken off the scores of seen classes before each pixel gets its name.": biased,
        "`N of M images` are the first N of the split.": any(map(is_partial, results)),
    }
    return [sentence for sentence, is_needed in needed.items() if is_needed]


def score(value: float | None, interval: list[float | None]) -> str:
    """A score and its interval in percent, as "38.6 [37.9, 39.2]"."""
    low, high = interval
    return percent(value) + ("" if low is None else f" [{percent(low)}, {percent(high)}]")


def origin(result: Result) -> str:
    """The protocol of a row."""
    prompts = result["prompts"] or []  # none if text vectors were given
    first = printable(prompts[0]).replace("`", "'") if prompts else ""
    parts = [
        f"label space sha256 `{result['label_space_sha256']}`",
        markdown(result["protocol"]),
        f"prompts: `{first}`" + (f" and {len(prompts) - 1} more" if prompts[1:] else "") if prompts else "",
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
    ]
    return "; ".join(part for part in parts if part) + "."


def per_class(result: Result) -> str:
    """The IoUs of all classes in one line, unseen ones in bold. The ovs setting has no unseen classes."""
    bold = [] if result["setting"] == "ovs" else result["unseen"]
    texts = {
        name: f"{markdown(name)} {score(iou, result['per_class_intervals'][name])}"
        for name, iou in result["per_class"].items()
    }
    return ", ".join(f"**{text}**" if name in bold else text for name, text in texts.items()) + "."
