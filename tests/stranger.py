"""A user who has transformers and not this project; run by test_hub.py in a process of its own.

    python -I stranger.py FOLDER PATH --prefix NAME [--resave TO] [--again PATH] [--textless PATH] [--drop TO]
        [--families PATHS]

Loads the checkpoint PATH (a folder or a Hub id) through every door, and writes what each returned to FOLDER/NAME.*.
FOLDER holds the picture image.png and the candidate labels labels.json. --resave saves what was loaded, --again
visits another checkpoint, --textless is one without a text tower. --drop saves PATH with the labels as its vocabulary
and without its text tower, and visits that. --families is a folder of checkpoints with class_head "regions".
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def forget_the_project() -> None:
    """Undo `pip install -e`, whichever way it was done; -I has taken care of the rest."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    ours = [place for place in sys.path if "__editable__" in place or (Path(place) / "modeling_zs3.py").exists()]
    sys.path[:] = [place for place in sys.path if place not in ours]
    sys.path_importer_cache.clear()
    for name in (
        "clip_views_zs3",
        "confidences_zs3",
        "configuration_zs3",
        "drawing_zs3",
        "encoders_zs3",
        "files_zs3",
        "label_maps_zs3",
        "losses_zs3",
        "modeling_zs3",
        "network_zs3",
        "outputs_zs3",
        "pipeline_zs3",
        "processing_zs3",
        "text_zs3",
        "zs3",
    ):
        assert name not in sys.modules and importlib.util.find_spec(name) is None, f"{name} can be found"


def ask_transformers_own_pipeline(path: str, image) -> tuple[list[str], np.ndarray]:
    """The names and masks of its segments."""
    from transformers import pipeline

    segments = pipeline("image-segmentation", model=path, trust_remote_code=True)(image)
    return [segment["label"] for segment in segments], np.stack([np.asarray(segment["mask"]) for segment in segments])


def visit(path: str, folder: Path, prefix: str, labels: list, image) -> "transformers.Pipeline":  # noqa: F821
    """Go through every door of a checkpoint; write arrays to folder/prefix.npz and facts to folder/prefix.json."""
    import torch
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
        AutoProcessor,
        pipeline,
    )

    arrays, facts = {}, {}
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    facts["config"] = [type(config).__name__, config.model_type, config.class_names]
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
    facts["processors"] = [type(processor).__name__, type(image_processor).__name__]
    facts["kept"] = [processor.prompt_templates, image_processor.ignore_index, processor.tokenizer.model_max_length]
    inputs = processor(image, class_names=labels)
    arrays["pixels"] = image_processor(image)["pixel_values"].numpy()
    assert np.array_equal(arrays["pixels"], inputs["pixel_values"].numpy())
    for door in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation):
        model = door.from_pretrained(path, trust_remote_code=True)
        facts[door.__name__] = [type(model).__name__, type(model).__module__]
        with torch.no_grad():
            outputs = model(**inputs)
        (label_map,) = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])
        arrays[f"{door.__name__}.map"] = label_map.numpy()
        arrays[f"{door.__name__}.mask_logits"] = outputs.mask_logits.numpy()
        arrays[f"{door.__name__}.class_logits"] = outputs.class_logits.numpy()
    segment = pipeline(model=path, trust_remote_code=True)
    facts["pipeline"] = [type(segment).__name__, segment.task]
    arrays["pipeline.map"] = segment(image, candidate_labels=labels, output="map")["segmentation"]
    segments = segment(image, candidate_labels=labels)
    facts["segments"] = [[segment["label"], segment["label_id"], segment["score"]] for segment in segments]
    arrays["pipeline.masks"] = np.stack([np.asarray(segment["mask"]) for segment in segments])
    arrays["vocabulary.map"] = segment(image, output="map")["segmentation"]
    facts["stock"], arrays["stock.masks"] = ask_transformers_own_pipeline(path, image)
    model.set_vocabulary(labels)  # its processor is found beside the checkpoint
    facts["new vocabulary"] = model.config.class_names
    with torch.no_grad():
        arrays["new vocabulary.class_logits"] = model(**image_processor(image)).class_logits.numpy()
    np.savez(folder / f"{prefix}.npz", **arrays)
    (folder / f"{prefix}.json").write_text(json.dumps(facts))
    return segment


def drop(path: str, to: str, folder: Path, labels: list, image) -> None:
    """Save without the text tower, with the labels as the vocabulary; what is left, to folder/dropped.*."""
    from transformers import AutoModel, AutoProcessor, pipeline

    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    model.set_vocabulary(labels)
    model.save_pretrained(to, drop_text_tower=True)
    AutoProcessor.from_pretrained(path, trust_remote_code=True).save_pretrained(to)
    left, loading = AutoModel.from_pretrained(to, trust_remote_code=True, output_loading_info=True)
    segment = pipeline(model=to, trust_remote_code=True)
    arrays = {"map": segment(image, output="map")["segmentation"]}
    arrays["named"] = segment(image, candidate_labels=left.config.class_names, output="map")["segmentation"]
    stock, arrays["stock.masks"] = ask_transformers_own_pipeline(to, image)
    np.savez(folder / "dropped.npz", **arrays)
    lost = sorted(loading["missing_keys"] | loading["unexpected_keys"])
    facts = {"tower": left.text_model is not None, "lost": lost, "names": left.config.class_names, "stock": stock}
    (folder / "dropped.json").write_text(json.dumps(facts))


def main() -> None:
    forget_the_project()
    from PIL import Image
    from transformers import pipeline

    folder, path, *options = sys.argv[1:]
    options = dict(zip(options[::2], options[1::2], strict=True))
    folder = Path(folder)
    image = Image.open(folder / "image.png").convert("RGB")
    labels = json.loads((folder / "labels.json").read_text())
    segment = visit(path, folder, options["--prefix"], labels, image)
    if "--resave" in options:
        segment.save_pretrained(options["--resave"])
    if "--again" in options:
        visit(options["--again"], folder, "again", labels, image)
    if "--textless" in options:
        textless = pipeline(model=options["--textless"], trust_remote_code=True)
        known = textless(image, candidate_labels=["red circle", "sky"], output="map")
        np.save(folder / "textless.npy", known["segmentation"])
        try:
            textless(image, candidate_labels=["sky", "zebra"])
        except ValueError as error:
            (folder / "textless.txt").write_text(str(error))
    if "--families" in options:
        arrays = {}
        for checkpoint in sorted(Path(options["--families"]).iterdir()):
            segment = pipeline(model=str(checkpoint), trust_remote_code=True)
            arrays[f"{checkpoint.name}.map"] = segment(image, candidate_labels=labels, output="map")["segmentation"]
            (proposed,) = segment.propose(image).outputs
            arrays[f"{checkpoint.name}.region_embeds"] = proposed["region_embeds"].numpy()
        np.savez(folder / "families.npz", **arrays)
    if "--drop" in options:
        drop(path, options["--drop"], folder, labels, image)


if __name__ == "__main__":
    main()
