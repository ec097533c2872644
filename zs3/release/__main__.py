"""Prepares a checkpoint for the Hub: a flat folder with weights, code, processor and card, and uploads it.

    zs3 release --model runs/stage2/final --results runs/stage2/gzs3.json --repo_id owner/name
    zs3 release --model runs/stage2/final --results runs/stage2/gzs3.json --repo_id owner/name --push --tag v1

Without --push it is a dry run: the folder is made, tested and listed, but not uploaded. The card is a template of
hub_cards/ with the scores of the result files (zs3/release/card.py). The code is this project's or, with
--trust_remote_code, the code beside the checkpoint. Before the folder gets its name, a "stranger" tests it: a process
that cannot import the project loads the model with that code and segments a picture (zs3/release/stranger.py).
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from configuration_zs3 import beginning, one_line, shortened
from files_zs3 import is_leftover, read_text
from modeling_zs3 import AUTO_MAP, CUSTOM_PIPELINES
from zs3.checkpoints import (
    CONFIGS,
    TOKENIZER,
    check_checkpoint,
    code_sha256,
    entries,
    load_config,
    load_processor,
    project_code,
    read_settings,
    settings_sha256,
    weight_files,
    weights_sha256,
    with_imports,
)
from zs3.command_line import (
    Arguments,
    InputError,
    OutputFolder,
    check_required,
    flag,
    read_arguments,
    refuse_alone,
    run,
    shown,
    try_output,
)
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import read_result
from zs3.files import file_sha256, naming, project_folder, write_text, writing_folder
from zs3.label_space import is_hub_id
from zs3.release.card import example_labels, model_card, recipes_of, space_with_seen, tables
from zs3.scores.means import ADDED_SCORES, SCORES

HUB_CARDS = project_folder("hub_cards")
NO_TEMPLATES = ("README", "assembled")  # `zs3 assemble` fills in the second
OF_BENCHMARKS = ("coco_stuff_171", "scenes", "voc_20")  # templates that are named after their label space
FIRST_SCORES = [name for name in SCORES if name not in ADDED_SCORES]  # those that all result files have
NEEDED = (
    *("setting", "dataset", "split", "split_sha256", "split_images", "num_images", "label_space_sha256"),
    *("checkpoint_sha256", "settings_sha256", "seen", "unseen", "without", "absent", "prompts", "calibration"),
    *("clip_ensemble", "clip_ensemble_weight", "protocol", "versions"),
    *("calibration.seen_bias", "calibration.seen_bias_chosen"),
    *(*FIRST_SCORES, "confidence_intervals", "per_class_intervals"),
    *(f"confidence_intervals.{name}" for name in FIRST_SCORES),
)
OWN_CLASSES = {
    *AUTO_MAP.values(),
    *(pipeline["impl"] for pipeline in CUSTOM_PIPELINES.values()),
    *("processing_zs3.Zs3ImageProcessor", "processing_zs3.Zs3Processor"),
}
NOT_THE_STRANGERS = ("HF_", "HUGGINGFACE_", "PYTHON", "TRANSFORMERS_")  # prefixes of environment variables to remove
SEAL = "\n<!-- Made by zs3 release. sha256 of this folder: "


@dataclass
class ReleaseArgs(Arguments):
    """Makes a folder for the Hub from a checkpoint; --push uploads it."""

    model: str | None = flag(None, "Folder of the checkpoint.")
    trust_remote_code: bool = flag(
        False, "Release and run the code that lies beside the checkpoint, in place of this project's."
    )
    results: list[str] = flag([], "Result files of eval.py for this checkpoint; without them the card has no scores.")
    repo_id: str | None = flag(None, "Hub id, owner/name, of the repository.")
    card: str | None = flag(
        None,
        "Template of hub_cards/, or a .md file of your own with {{ card_data }} in its front matter and {{ results }} "
        "below; default: the template for the classes with masks in training.",
    )
    output: OutputFolder | None = flag(None, "New folder; default: runs/release/NAME.")
    push: bool = flag(False, "Upload the folder; without it this is a dry run.")
    tag: str | None = flag(None, "Tag of the uploaded version, such as v1.")

    def check(self) -> None:
        check_required(self, "model", "repo_id")
        if not is_hub_id(self.repo_id):
            raise InputError(f"--repo_id {self.repo_id} is no Hub id of the form owner/name")
        refuse_alone(self, "tag", without="push")
        if not Path(self.model).is_dir():
            raise InputError(f"--model {self.model}: no such folder of a checkpoint; train.py writes one (its final/)")
        check_checkpoint("model", self.model)


# ---- what goes into the folder -----------------------------------------------------------------------------


def release_files(model: Path, code: Iterable[Path] | None = None) -> list[Path]:
    """The files to release: configuration, weights and processor of the checkpoint, and code.

    code: the modules; None: those of the checkpoint.
    """
    named = [model / name for name in (*CONFIGS, *TOKENIZER) if (model / name).is_file()]
    if not {"processor_config.json", "preprocessor_config.json"} & {path.name for path in named}:
        raise InputError(f"{model} has no processor: processor.save_pretrained writes it beside the weights")
    return sorted({*named, *weight_files(model), *(code_files(model) if code is None else code)})


def project_code_of(model: Path) -> set[Path]:
    """This project's modules. Raises InputError if they lack a class that the checkpoint's configurations name."""
    for reference, name in named_classes(model):
        if reference not in OWN_CLASSES:
            raise InputError(f"{model / name} names {reference}, which this project does not have: save it anew")
    return project_code()


def code_files(model: Path) -> set[Path]:
    """The modules that the configurations name, and their imports."""
    try:
        return with_imports({model / f"{reference.rpartition('.')[0]}.py" for reference, _ in named_classes(model)})
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(f"{model} lacks {missing}, code that it needs: model.save_pretrained writes it") from error


def named_classes(model: Path) -> list[tuple[str, str]]:
    """Each "module.Class" in the configurations of a checkpoint, with the name of the configuration file."""
    found = []
    for name in CONFIGS:
        for reference in class_references(read_settings(model / name)) if (model / name).is_file() else ():
            if not isinstance(reference, str) or not re.fullmatch(r"(\S+--)?\w+\.\w+", reference):
                raise InputError(f"{model / name} names no class by {shortened(reference)}: save it anew")
            if "--" in reference:
                raise InputError(f"{model / name}: the code of {reference} lies in another repository, save it anew")
            found.append((reference, name))
    if not found:
        raise InputError(f"{model / 'config.json'} names no code (auto_map): model.save_pretrained writes it")
    return found


def class_references(settings: dict) -> Iterator[object]:
    """The "module.Class" of every auto_map and custom pipeline, at any depth. Wrong entries are returned unchanged."""
    for key, value in entries(settings):
        if key == "auto_map":
            for reference in value.values() if isinstance(value, dict) else [value]:
                yield from filter(None, reference) if isinstance(reference, list) else [reference]
        elif key == "custom_pipelines":
            for pipeline in value.values() if isinstance(value, dict) else [value]:
                yield pipeline.get("impl") if isinstance(pipeline, dict) else pipeline


def read_results(paths: Sequence[str], sha256: str, settings: str) -> list[Result]:
    """Reads result files of eval.py. They must have these hashes of weights and of configuration."""
    results: list[Result] = []
    for file in map(Path, paths):
        result, path = read_result(file, NEEDED), shown(file)
        if result["checkpoint_sha256"] is None:
            raise InputError(f"{path} does not say which weights it is of: evaluate the folder of --model")
        if result["checkpoint_sha256"] != sha256:
            raise InputError(
                f"{path} is of other weights (sha256 {result['checkpoint_sha256'][:12]}..., those of --model have "
                f"{sha256[:12]}...): leave it out, or evaluate this checkpoint"
            )
        if result["settings_sha256"] != settings:
            raise InputError(f"{path} is of these weights with another configuration: evaluate this checkpoint again")
        if result in results:
            raise InputError(f"{path} equals another of --results: give each once")
        results.append(result)
    return results


def chosen_template(card: str | None, config: PreTrainedConfig, results: Sequence[Result]) -> Path:
    """The template. card: the flag; None: the template for the classes with masks in training. It must fit them."""
    names = sorted(path.stem for path in HUB_CARDS.glob("*.md") if path.stem not in NO_TEMPLATES)
    if card is not None and card.endswith(".md"):
        path = Path(card)
    else:
        trained = config.seen_class_names or []
        fitting = [name for name in OF_BENCHMARKS if space_with_seen(name, trained) is not None]
        fitting += ["ovs"] if "coco_stuff_171" in fitting else []
        elsewhere = bool(results) and all(result["setting"] == "ovs" for result in results)
        chosen = card or next(iter(fitting[:: -1 if elsewhere else 1]), "")
        if chosen in names and chosen not in fitting or not chosen:
            raise InputError(
                f"the masks that training saw do not fit {f'card {chosen}' if chosen else 'any card'} (fitting: "
                f"{' or '.join(fitting) or 'none'}): give a .md file of your own as --card"
            )
        path = HUB_CARDS / f"{chosen}.md"
    if not path.is_file() or (path.parent == HUB_CARDS and path.stem in NO_TEMPLATES):
        raise InputError(f"--card {card}: no such template; there are {', '.join(names)}, or a .md file of your own")
    return path


# ---- the folder --------------------------------------------------------------------------------------------


def check_unchanged(folder: Path) -> None:
    """Raises InputError unless the folder is missing, empty, or made by `make_folder` and not changed since."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (is_empty or is_sealed(folder)):
        raise InputError(
            f"--output {folder} holds something else, or was changed by hand: move it away, or name another"
        )


def make_folder(files: Sequence[Path], card: str, folder: Path, labels: Sequence[str]) -> str:
    """Copies the files, writes the card and tests the folder before it gets its name. Returns the stranger's answer.

    An older folder of this name is replaced; call `check_unchanged` first.
    """
    old = folder.with_name(folder.name + ".old")
    try:
        with writing_folder(folder) as partial:
            shutil.rmtree(old, ignore_errors=True)  # left by a stopped run
            for path in files:
                with naming(folder / path.name):
                    shutil.copyfile(path, partial / path.name)
            write_text(partial / "README.md", card + SEAL + f"{contents_sha256(partial, card)} -->\n")
            answer = visited(partial, labels)
            if folder.exists():
                os.replace(folder, old)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    return answer


def contents_sha256(folder: Path, card: str) -> str:
    """Digest of the names and contents of all files, with `card` in place of the README."""
    digest = hashlib.sha256(card.encode())
    files = (path for path in folder.rglob("*") if path.is_file() and not is_leftover(path.name))
    for path in sorted({*files} - {folder / "README.md"}):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def is_sealed(folder: Path) -> bool:
    """Whether `make_folder` made the folder, and it was not changed since."""
    try:
        card, _, seal = read_text(folder / "README.md").rpartition(SEAL)
    except (OSError, ValueError):
        return False
    return seal.removesuffix(" -->\n") == contents_sha256(folder, card)


def visited(folder: Path, labels: Sequence[str]) -> str:
    """The answer of the stranger who loads the folder offline, in an empty working folder, with empty caches."""
    with tempfile.TemporaryDirectory(prefix="zs3_stranger_") as home:
        place = Path(home, "elsewhere")
        place.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THE_STRANGERS)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": str(Path(home, "modules"))}
        script = Path(__file__).with_name("stranger.py")
        command = [sys.executable, "-I", str(script), str(folder.resolve()), *labels]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"a stranger cannot use this checkpoint, so nothing was made: {beginning(last, 120)}")
    return done.stdout.strip().splitlines()[-1]


def listing(folder: Path) -> str:
    """A line for each file with its size in bytes, and the sum."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    lines = [f"{size:15,}  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):15,}  bytes in {len(sizes)} files"])


# ---- the Hub -----------------------------------------------------------------------------------------------


def push(folder: Path, repo_id: str, tag: str | None) -> None:
    """Uploads the folder as one commit. Weights, code and JSON files that it lacks are deleted on the Hub."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    step = "cannot upload"
    mend = f"the folder {folder} is whole, the same command tries again"
    if get_token() is None:
        raise InputError(f"{step} to {repo_id}: no token, `hf auth login` or HF_TOKEN gives one; {mend}")
    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            delete_patterns=["*.py", "*.safetensors", "*.json"],
            commit_message=" ".join(["Release", *([tag] if tag else [])]),
        )
        if tag is not None:
            step = f"uploaded, but cannot set the tag {tag}"
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    # The bases of HfHubHTTPError: OSError, and all errors of the HTTP library, which changes with huggingface_hub.
    except (*HfHubHTTPError.__bases__, ValueError) as error:
        raise InputError(f"{step} to {repo_id} ({one_line(error)}): {mend}") from error


def main() -> None:
    args, _ = read_arguments(ReleaseArgs)
    model = Path(args.model)
    folder = Path(args.output or Path("runs", "release", args.repo_id.split("/")[-1]))
    try_output("--output", folder, "folder")
    check_unchanged(folder)
    files = release_files(model, None if args.trust_remote_code else project_code_of(model))
    sha256 = weights_sha256(args.model)
    config = load_config(args.model, args.trust_remote_code)
    load_processor(args.model, config, args.trust_remote_code)  # for its checks
    results = read_results(args.results, sha256, settings_sha256(args.model))
    code = code_sha256(args.model, args.trust_remote_code)
    if args.card is None and getattr(config, "class_head", "learned") == "regions":
        template = model / "README.md"  # of `zs3 assemble`
        with naming(template):
            card = read_text(template)
        if results:
            card += f"\n## Results\n\n{tables(results, sha256, code)}\n"
    else:
        template = chosen_template(args.card, config, results)
        card = model_card(template, args.repo_id, config, sha256, recipes_of(model), results, code)
    print("a stranger loads it and segments a picture ...", flush=True)
    answer = make_folder(files, card, folder, example_labels(config))
    print(listing(folder))
    print(f"stranger  {answer}")
    print(f"card      {template.stem}, {len(results)} result files")
    others = sum(result["code_sha256"] != code for result in results if "code_sha256" in result)
    if others:
        print(f"note      {others} of the results were evaluated with other code than is released; the card says so")
    print(f"folder    {folder}")
    if args.push:
        push(folder, args.repo_id, args.tag)
        print(f"uploaded  https://huggingface.co/{args.repo_id}")
    else:
        print(f"not uploaded; --push uploads it to {args.repo_id}")


if __name__ == "__main__":
    run(main)
