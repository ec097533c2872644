"""Zs3Pipeline: `pipeline(model=..., trust_remote_code=True)(image, candidate_labels=[...])`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import Pipeline
from transformers.image_utils import load_image

try:
    from .modeling_zs3 import semantic_map
    from .processing_zs3 import ClassName, padded_size, read_labels
except ImportError:
    if __package__:
        raise
    from modeling_zs3 import semantic_map
    from processing_zs3 import ClassName, padded_size, read_labels


class Zs3Pipeline(Pipeline):
    """Segment images with a label list of your own.

    segment(images, candidate_labels=[...]): an image is a path, an address, a PIL image or a (H, W, 3) uint8 array; a
    label is a name, a list of synonyms, or a dict with `name`, `synonyms` and `templates`. Without candidate_labels the
    vocabulary stored in the checkpoint is used; a checkpoint without a text tower takes names of that vocabulary only.

    Returns for each image a list of {"label", "label_id", "score", "mask"}, one entry a label that occurs:
    label_id indexes the list given, score is the mean of Eq. 4 over the region, at most 1, mask is a PIL "L" image
    (255 inside). With output="map": {"segmentation": (H, W) int64, "labels": names, "scores": (H, W) float32}, the
    scores of Eq. 4 as they are: a sum over queries, at least 0, often above 1. No score is a calibrated confidence.
    """

    _load_processor = None  # absent where the text vectors came from outside
    _load_image_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False

    def __call__(self, images, candidate_labels: Sequence[ClassName] | None = None, **kwargs):
        kwargs["batch_size"] = 1  # images have sizes of their own, which transformers cannot collate
        if isinstance(images, list | tuple) and len(images) == 0:
            return []
        return super().__call__(images, candidate_labels=candidate_labels, **kwargs)

    def _sanitize_parameters(
        self, candidate_labels: Sequence[ClassName] | None = None, output: str | None = None
    ) -> tuple[dict, dict, dict]:
        if output not in (None, "masks", "map"):
            raise ValueError(f"output must be 'masks' or 'map', got {output!r}")
        postprocess_params = {} if output is None else {"output": output}
        if candidate_labels is None:
            return {}, {}, postprocess_params
        names, text_embeds = self._read_labels(candidate_labels)
        return {}, {"text_embeds": text_embeds}, {**postprocess_params, "class_names": names}

    def _read_labels(self, candidate_labels: Sequence[ClassName]) -> tuple[list[str], Tensor]:
        if self.model.text_model is not None:
            if self.processor is None:
                raise ValueError("this checkpoint has a text tower, but its Zs3Processor could not be loaded")
            labels = read_labels(candidate_labels, self.processor.prompt_templates)
            tokens = self.processor.tokenize(labels)
            tokens = {name: tensor.to(self.device) for name, tensor in tokens.items()}
            return [label.name for label in labels], self.model.encode_text(**tokens)
        stored = self.model.config.class_names or []
        names = [label.name for label in read_labels(candidate_labels)]
        missing = [name for name in names if name not in stored]
        if missing:
            raise ValueError(
                f"{missing[0]!r} is not in this checkpoint's vocabulary, and it has no text tower: {stored}"
            )
        return names, self.model.vocabulary[[stored.index(name) for name in names]]

    def preprocess(self, image) -> dict:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image = load_image(str(image) if isinstance(image, Path) else image)
        return {**self.image_processor(image), "image_size": (image.height, image.width)}

    def _forward(self, inputs: dict, text_embeds: Tensor | None = None) -> dict:
        image_size = inputs.pop("image_size")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model(**inputs, text_embeds=text_embeds)
        return {
            "class_probs": outputs.class_probs,
            "mask_logits": outputs.mask_logits,
            "valid_sizes": outputs.valid_sizes,
            "image_size": image_size,
        }

    def postprocess(self, result: dict, class_names: list[str] | None = None, output: str = "masks"):
        names = class_names if class_names is not None else self.model.config.class_names
        (best,) = semantic_map(
            result["class_probs"],
            result["mask_logits"],
            padded_size(result["mask_logits"]),
            valid_sizes=result["valid_sizes"],
            image_sizes=[result["image_size"]],
            return_scores=True,
        )
        label_map, scores = best.label_map.numpy(), best.score.numpy()
        if output == "map":
            return {"segmentation": label_map, "labels": list(names), "scores": scores}
        segments = []
        for label_id in np.unique(label_map).tolist():
            region = label_map == label_id
            segments.append(
                {
                    "label": names[label_id],
                    "label_id": label_id,
                    "score": min(1.0, float(scores[region].mean())),
                    "mask": Image.fromarray(np.where(region, np.uint8(255), np.uint8(0)), mode="L"),
                }
            )
        return segments

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the model, its code and the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        processor = self.image_processor if self.processor is None else self.processor
        processor.save_pretrained(save_directory)


__all__ = ["Zs3Pipeline"]
