"""Zs3Pipeline: `pipeline(model=..., trust_remote_code=True)(image, candidate_labels=[...])`.

An image is cut into views, overlapping windows or one for all. The network makes proposals of each view. A label list
turns proposals into a label map. `propose` gives the proposals, so that further label lists need no network.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline, PreTrainedModel
from transformers.utils import logging

try:
    from .clip_views_zs3 import ProposalEmbeds
    from .configuration_zs3 import Refused, RegionView, as_number, one_line, places, shortened
    from .drawing_zs3 import NONE_OF_THESE, draw
    from .files_zs3 import (
        PICTURE_SUFFIXES,
        is_address,
        is_leftover,
        is_picture_name,
        load_picture,
        save_map,
        shown_name,
    )
    from .label_maps_zs3 import semantic_map
    from .outputs_zs3 import Zs3Output, best_synonyms
    from .processing_zs3 import check_colours, padded_size
    from .text_zs3 import (
        ClassName,
        Label,
        LabelReport,
        TextCache,
        check_text_embeds,
        embed_labels,
        lint_labels,
        read_labels,
        seen_labels,
    )
except ImportError:
    if __package__:
        raise
    from clip_views_zs3 import ProposalEmbeds
    from configuration_zs3 import Refused, RegionView, as_number, one_line, places, shortened
    from drawing_zs3 import NONE_OF_THESE, draw
    from files_zs3 import PICTURE_SUFFIXES, is_address, is_leftover, is_picture_name, load_picture, save_map, shown_name
    from label_maps_zs3 import semantic_map
    from outputs_zs3 import Zs3Output, best_synonyms
    from processing_zs3 import check_colours, padded_size
    from text_zs3 import (
        ClassName,
        Label,
        LabelReport,
        TextCache,
        check_text_embeds,
        embed_labels,
        lint_labels,
        read_labels,
        seen_labels,
    )

logger = logging.get_logger(__name__)

THRESHOLDS = {"probability": 0.5, "margin": 0.1}  # of `background="reject"` without a threshold
CHOICE = ("candidate_labels", "synonyms", "background", "threshold", "confidence", "output")
ENSEMBLE = ("ensemble", "ensemble_weight")

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


class View(NamedTuple):
    """A part of an image that the network sees at once; both (left, top, right, bottom) in the image's pixels."""

    box: tuple[int, int, int, int]  # what the network sees
    own: tuple[int, int, int, int]  # the part of its result that is kept

    @property
    def own_part(self) -> tuple[slice, slice]:
        """The rows and the columns of its result that are kept."""
        left, top, right, bottom = self.own
        return slice(top - self.box[1], bottom - self.box[1]), slice(left - self.box[0], right - self.box[0])


@dataclass
class Proposals:
    """The network's outputs for one image. Give them to the pipeline in the image's place, with any label list.

    image_size: (height, width). outputs: for each view mask_logits (1, Q, h, w), class_embeds (1, Q, D) and
    valid_sizes (1, 2), and region_embeds (1, Q, D) and objectness (1, Q) where the checkpoint has them, as in
    Zs3Output, on the CPU; with an ensemble also clip_embeds (1, Q, D), shown_to_clip (1, Q).
    ensemble: CLIP's view of them, a RegionView, or "off". checkpoint: its `fingerprint`.
    """

    image_size: tuple[int, int]
    views: list[View]
    outputs: list[dict[str, Tensor]]
    ensemble: str
    checkpoint: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Choice:
    """A label list ready for the model, and the options that go with it.

    names: the labels, then the distractors; num_labels: the number of labels. text_embeds: (S, D), a row for each name,
    or with synonyms="max" for each synonym. owner: (S,) int64, the name of each row.
    threshold: a pixel whose `confidence` is below it gets no label; None: off.
    is_seen: bool, the names whose masks the training saw. ensemble, ensemble_weight, output: see the pipeline.
    """

    names: list[str]
    text_embeds: Tensor
    owner: Tensor
    num_labels: int
    threshold: float | None
    confidence: str
    is_seen: Tensor
    ensemble: str
    ensemble_weight: float | None
    output: str


class Unreadable(Refused):
    """Some images of a list cannot be read. results: one entry an image, None for those images."""

    def __init__(self, message: str, results: list):
        super().__init__(message)
        self.results = results

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.results)


@dataclass
class Lost:
    """Stands for an image that cannot be read, and for its result. error: raised when the result is wanted."""

    error: Exception


class Rows(Dataset):
    """A dataset in which a row that raises is Lost, so that the other rows can still be read."""

    def __init__(self, rows: Dataset | Sequence):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> object:
        try:
            return self.rows[place]
        except Exception as error:
            return Lost(error)


class Images(Dataset):
    """Images in their order, in a form that transformers does not change. alone: the caller gave one image, no list."""

    def __init__(self, images: Iterable, alone: bool = False):
        self.images = images
        self.alone = alone

    def __len__(self) -> int:
        return len(self.images)

    def loaded(self, num_workers: int) -> Iterator:
        """Yields the images. num_workers processes read a dataset that has a length."""
        by_index = isinstance(self.images, Dataset | Sequence) and hasattr(self.images, "__len__")
        if not by_index or isinstance(self.images, IterableDataset):
            return iter(self.images)
        rows = Rows(self.images)
        if num_workers:
            return iter(DataLoader(rows, batch_size=None, collate_fn=_unchanged, num_workers=num_workers))
        return (rows[place] for place in range(len(rows)))

    def named(self, error: Exception, place: int) -> Lost:
        """An image that is lost, with an error that names it."""
        if isinstance(error, OSError):  # of a decoder or the disk
            error = Refused(f"it cannot be read as an image: {one_line(error, 100)}")
        if isinstance(error, Refused) and not self.alone:
            error = Refused(f"images[{place}]: {error}")
        elif not isinstance(error, Refused):
            error.add_note(f"It was raised by images[{place}].")
        return Lost(error)


class Results(IterableDataset):
    """The results of several images, made when they are wanted. The length is that of the images, where it is known.

    For an image that cannot be read `next` raises Refused or the dataset's own error. It then gives the other results.
    """

    def __init__(self, images: Images, make: Callable[[Images], Iterator]):
        self.images, self.make = images, make
        self._made: Iterator | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_made": None}

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> "Results":
        """Begins with the first image, as in transformers; where the images are an iterator, with its next one."""
        if self._made is None or not isinstance(self.images.images, Iterator):
            self._made = self.make(self.images)
        return self

    def __next__(self) -> dict | list[dict] | Proposals:
        if self._made is None:
            iter(self)
        result = next(self._made)
        if isinstance(result, Lost):
            raise result.error
        return result

    def all(self) -> list:
        """Raises Unreadable where an image cannot be read, after the others."""
        made = list(self.make(self.images))
        lost = [result.error for result in made if isinstance(result, Lost)]
        if lost:
            message = str(lost[0])
            others = f" ({len(lost)} of {len(made)}; error.results has the others)"
            if len(lost) < len(made) and len(message + others) <= 200:
                message += others
            raise Unreadable(message, [None if isinstance(result, Lost) else result for result in made])
        return made


class Zs3Pipeline(Pipeline):
    """Segment images with a label list of your own.

    segment(images, candidate_labels=[...], **options)

    images: one image, as for `load_picture` of files_zs3, or `Proposals`. A list of these, or a folder of images (in
        the order of their names), gives a list of results. A dataset, a column of one or a generator gives `Results`,
        made when they are wanted. Where some images of a list cannot be read, `Unreadable` is raised after the others.
    candidate_labels: each a name, a list of synonyms, or a dict with `name`, `synonyms` and `templates`; None: the
        vocabulary stored in the checkpoint. A checkpoint without a text tower takes names of that vocabulary only.
    synonyms: "mean", a label is the mean of the text vectors of all its prompts; or "max", each query uses the synonym
        that fits it best: a further synonym then never takes a pixel from its label.
    background: None, every pixel gets its best label; "reject", a pixel gets no label where its confidence is below
        `threshold`; or a list of distractors, labels of no interest: pixels that they win get no label.
    confidence: the measure that the threshold is for. "probability" is what decided queries give the winner on average
        (GridConfidences defines it; default threshold 0.5), "margin" is this minus the largest confidence of another
        label (0.1).
    ensemble: CLIP's view of the proposals joined in (section 4.6): "crops", of a crop of each; "single_pass", an
        approximation from one pass over the image; "mixed", crops of the largest proposals and one pass for the others;
        or "off". None: "crops" where the checkpoint has an image tower, a
        weight and a record of the classes that its training saw, else "off". Scores are then of products of
        probabilities, which do not sum to 1.
    ensemble_weight: w, in [0, 1]; None: the checkpoint's.
    window, overlap: pixels. Larger images are cut into overlapping windows of this side, each resized as an image is;
        a pixel belongs to the window whose border is farthest from it. None: the image as a whole.
    batch_size: views that the network sees at once. It does not change the results.
    num_workers: processes that read images of a dataset with a length. None: 0, this process reads them.
    timeout: seconds for the download of an address. None: 60.
    subtask: "semantic" or None, as for transformers' own pipeline.
    output: "masks", a list of {"label", "label_id", "score", "mask"} for each label that occurs: label_id indexes the
        list given, score is the mean confidence (probability), mask a PIL "L" image (255 inside); or "map", a dict
        {"segmentation": (H, W) int64, "labels": names, "scores": (H, W) float32}. Pixels without a label have the id
        -1, the label "none of these", and the score of their best label.

    The probability is not calibrated: look at an evaluation's results before you rely on a threshold.
    """

    _load_processor = None  # absent where the text vectors came from outside
    _load_image_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        self.text_cache = TextCache()
        super().__init__(*args, **kwargs)
        check_colours(self.model.config, self.image_processor)

    def __call__(
        self,
        images: ImageLike | Proposals | Iterable | None = None,
        candidate_labels: Sequence[ClassName] | None = None,
        **options,
    ) -> "dict | list[dict] | list[list[dict]] | Results":
        if "inputs" in options:  # transformers' name
            if images is not None:
                raise ValueError("inputs is another name of images: give one of the two")
            images = options.pop("inputs")
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        if isinstance(images, str | Path) and not is_address(images) and os.path.isdir(images):
            images = _folder(Path(images))
        if not _are_several(images):
            return next(super().__call__(Images([images], alone=True), **options))
        results = super().__call__(Images(images), **options)
        return results.all() if isinstance(images, list | tuple | np.ndarray | Tensor) else results

    def propose(
        self,
        images: ImageLike | Iterable,
        *,
        window: int | None = None,
        overlap: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        ensemble: str | None = None,
    ) -> "Proposals | list[Proposals] | Results":
        """The network's part alone: see the class, and Proposals."""
        options = {"window": window, "overlap": overlap, "timeout": timeout}
        options |= {"batch_size": batch_size, "num_workers": num_workers}
        options |= {} if ensemble is None else {"ensemble": ensemble}
        return self(images, propose=True, **options)

    def draw(self, image: ImageLike, result: dict | list[dict], **options) -> Image.Image:
        """The result over its image, with a legend: see `draw` of drawing_zs3."""
        return draw(image, result, **options)

    def save_map(self, result: dict, path: str | Path) -> None:
        """Saves a result with output="map" as a PNG of ids: see `save_map` of files_zs3."""
        save_map(result, path)

    def lint_labels(self, class_names: Sequence[ClassName]) -> LabelReport:
        """Facts about a label list before it is used: see `lint_labels` of text_zs3."""
        return lint_labels(class_names, model=self.model, processor=self.processor, cache=self.text_cache)

    def _sanitize_parameters(self, **options) -> tuple[dict, dict, dict]:
        """Checks the options one by one. `_choose` checks them together, with those of the pipeline's making."""
        steps = {
            "preprocess": ("window", "overlap", "timeout"),
            "forward": (*CHOICE, *ENSEMBLE, "propose"),
            "postprocess": (),
        }
        known = [*(name for names in steps.values() for name in names), "subtask"]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "labels are candidate_labels=[...]; see its help()"
                raise ValueError(f"{shortened(name)} is no option of this pipeline: {hint}")
        choices = {"output": ("masks", "map"), "synonyms": ("mean", "max"), "confidence": tuple(THRESHOLDS)}
        choices |= {"ensemble": ("off", *get_args(RegionView)), "subtask": ("semantic",)}
        for name, allowed in choices.items():
            value = options.get(name)
            if value is not None and not (isinstance(value, str) and value in allowed):
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shortened(value)}")
        for name, least, most in (("threshold", 0, 1), ("ensemble_weight", 0, 1), ("timeout", 0.001, 86400)):
            if options.get(name) is not None:
                options[name] = as_number(name, options[name], least, most)
        for name, least in (("window", 1), ("overlap", 0)):
            if options.get(name) is not None:
                options[name] = as_number(name, options[name], least, whole=True)
        background = options.get("background")
        fits = background == "reject" if isinstance(background, str) else isinstance(background, list | tuple | None)
        if not fits:
            raise ValueError(f"background must be 'reject' or a list of labels, got {shortened(background)}")
        if "background" in options:  # options that go with another background are reset
            options = {"threshold": None, "confidence": None, **options}
        if "window" in options:
            options = {"overlap": None, **options}
        return tuple({name: options[name] for name in names if name in options} for names in steps.values())

    # ----------------------------------------------------------------------------------------- from labels to vectors

    def _choose(
        self,
        candidate_labels: Sequence[ClassName] | None = None,
        synonyms: str | None = None,
        background: str | Sequence[ClassName] | None = None,
        threshold: float | None = None,
        confidence: str | None = None,
        ensemble: str | None = None,
        ensemble_weight: float | None = None,
        output: str | None = None,
    ) -> Choice:
        if (threshold is not None or confidence is not None) and background != "reject":
            raise ValueError('threshold and confidence need background="reject"')
        confidence = confidence or "probability"
        if background == "reject":
            threshold = THRESHOLDS[confidence] if threshold is None else threshold
        self.model.check_head()
        distractors = [] if background is None or background == "reject" else list(background)
        if candidate_labels is None and self.model.config.class_names is None:
            raise ValueError("no labels: pass candidate_labels=[...]; this checkpoint has no vocabulary of its own")
        if candidate_labels is not None and (not isinstance(candidate_labels, list | tuple) or not candidate_labels):
            raise ValueError(f'candidate_labels must be a list as ["sky", "grass"], got {shortened(candidate_labels)}')
        if candidate_labels is not None:
            labels, vectors, owner = self._embed([*candidate_labels, *distractors], synonyms)
        else:
            labels, vectors = read_labels(self.model.config.class_names, ()), self.model.vocabulary
            owner = list(range(len(labels)))
        if candidate_labels is None and distractors:  # the stored vectors may be of other prompts, or from outside
            read_labels([*self.model.config.class_names, *distractors])  # no repeats
            others, more, its_owner = self._embed(distractors, synonyms)
            owner += [len(labels) + place for place in its_owner]
            labels, vectors = [*labels, *others], torch.cat([vectors, more.to(vectors)])
        check_text_embeds(vectors, self.model.config.projection_dim)
        names = [label.name for label in labels]
        if len(names) == 1 and background == "reject":
            raise ValueError(
                f"{shortened(names[0])} alone is compared with nothing: name what else may be there, background=[...]"
            )
        owner = torch.tensor(owner, device=vectors.device)
        is_seen = torch.tensor(seen_labels(labels, self.model.config.seen_class_names))
        view = self.model.ensemble_view(ensemble, ensemble_weight)
        num_labels = len(names) - len(distractors)
        return Choice(
            names, vectors, owner, num_labels, threshold, confidence, is_seen, view, ensemble_weight, output or "masks"
        )

    def _embed(self, entries: list[ClassName], synonyms: str | None) -> tuple[list[Label], Tensor, list[int]]:
        """Labels, their text vectors, and the label of each vector."""
        if self.model.text_model is not None:
            if self.processor is None:
                raise ValueError("this checkpoint has a text tower, but its Zs3Processor could not be loaded")
            labels = read_labels(entries, self.processor.prompt_templates)
            apart = synonyms == "max"
            owner = [place for place, label in enumerate(labels) for _ in (label.words if apart else (label,))]
            return labels, embed_labels(labels, self.model, self.processor, self.text_cache, apart=apart), owner
        labels = read_labels(entries, ())
        rich = [label.name for label in labels if len(label.words) > 1 or label.templates]
        if rich or synonyms == "max":
            raise ValueError(
                f"this checkpoint has no text tower: no synonyms or templates ({shortened((rich or ['synonyms'])[0])})"
            )
        stored = self.model.config.class_names or []
        rows = places([label.name for label in labels], stored)
        if None in rows:
            missing = labels[rows.index(None)].name
            raise ValueError(
                f"{shortened(missing)} is not in this checkpoint's vocabulary, and it has no text tower: it knows "
                f"{len(stored)} names, {shortened(stored)}"
            )
        return labels, self.model.vocabulary[rows], list(range(len(labels)))

    # ---------------------------------------------------------------------------------------- from images to results

    def get_iterator(
        self,
        inputs: Iterable,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator:
        """In place of transformers' loop, which needs images of one size and one result for each view."""
        batch_size = as_number("batch_size", batch_size, 1, whole=True)
        num_workers = as_number("num_workers", num_workers, 0, whole=True)
        if forward_params.get("propose", False):
            view, weight = (forward_params.get(name) for name in ENSEMBLE)
            weight = 1.0 if view is not None and weight is None else weight  # any: the real one comes with the labels
            choice, view = None, self.model.ensemble_view(view, weight)
        else:
            choice = self._choose(**{name: value for name, value in forward_params.items() if name != "propose"})
            view = choice.ensemble
        options = {"num_workers": num_workers, "batch_size": batch_size, "preprocess": preprocess_params}
        return Results(inputs, partial(self._results, choice=choice, ensemble=view, **options))

    def _results(
        self,
        images: Images,
        *,
        num_workers: int,
        batch_size: int,
        choice: Choice | None,
        ensemble: str,
        preprocess: dict,
    ) -> Iterator:
        """Yields for each image its result, or its Proposals if choice is None, or Lost if it cannot be read."""
        count, checkpoint = 0, fingerprint(self.model) if choice is None else {}
        for group in _groups(images.loaded(num_workers), batch_size):
            inputs, seen, waiting = [], [[] for _ in group], []
            for place, image in enumerate(group):
                if isinstance(image, Lost):
                    inputs.append(images.named(image.error, count + place))
                    continue
                try:
                    inputs.append(self.preprocess(image, **preprocess))
                    waiting += [(place, view) for view in range(len(inputs[place]["views"]))]
                except Refused as error:
                    inputs.append(images.named(error, count + place))
            count += len(group)
            for start in range(0, len(waiting), batch_size):
                part = waiting[start : start + batch_size]
                made = self.forward(
                    [self._look(inputs[place], view) for place, view in part], choice=choice, ensemble=ensemble
                )
                for (place, _), result in zip(part, made, strict=True):
                    seen[place].append(result)
            for image, results in zip(inputs, seen, strict=True):
                if isinstance(image, Lost):
                    yield image
                elif choice is None:
                    yield Proposals(image["image_size"], image["views"], results, ensemble, checkpoint)
                else:
                    yield self.postprocess({**image, "results": results, "choice": choice})

    def preprocess(
        self,
        image: ImageLike | Proposals,
        window: int | None = None,
        overlap: int | None = None,
        timeout: float | None = None,
    ) -> dict:
        if _are_proposals(image):
            if not self._made(image):
                raise Refused("another checkpoint made these proposals: make them anew, with this pipeline's propose")
            if window is not None:
                raise ValueError("window goes with propose(...), not with proposals that are made")
            kept = {"outputs": image.outputs, "kept_ensemble": image.ensemble}
            return {"image_size": image.image_size, "views": image.views, **kept}
        image = load_picture(image, timeout)
        views = _views(image.width, image.height, window, overlap)
        return {"image_size": (image.height, image.width), "views": views, "image": image}

    def _made(self, proposals: Proposals) -> bool:
        """Whether this checkpoint made the proposals, in any precision, as far as it is known."""
        if any(output["class_embeds"].shape[2] != self.model.config.projection_dim for output in proposals.outputs):
            return False
        made, own = getattr(proposals, "checkpoint", {}), fingerprint(self.model)
        pairs = [(made[name], own[name]) for name in made.keys() & own.keys()]
        return all(one.shape == two.shape and torch.allclose(one, two, rtol=2**-7, atol=1e-6) for one, two in pairs)

    def _look(self, image: dict, view: int) -> dict:
        """The input of `_forward` for a view: its part of the image, or its outputs from before."""
        own = image["views"][view]
        if "outputs" in image:
            return {"view": own, "outputs": image["outputs"][view], "kept_ensemble": image["kept_ensemble"]}
        return {"view": own, "image": image["image"].crop(own.box)}

    def _forward(self, views: list[dict], choice: Choice | None, ensemble: str) -> list[dict[str, Tensor]]:
        fresh = [view for view in views if "image" in view]
        if fresh:
            inputs = self.image_processor([view["image"] for view in fresh]).to(self.device)
            images = None if ensemble == "off" else self.image_processor.to_rgb(inputs["pixel_values"])
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            outputs = self.model.propose(**inputs)
            if images is not None:
                clip = self.model.embed_proposals(images, outputs["mask_logits"], outputs["valid_sizes"], view=ensemble)
                outputs |= {"clip_embeds": clip.embeds, "shown_to_clip": clip.shown}
            for row, view in enumerate(fresh):
                view["outputs"] = {name: value[row : row + 1] for name, value in outputs.items()}
        if choice is None:
            return [view["outputs"] for view in views]
        for view in views:
            wanted, kept = choice.ensemble, view.get("kept_ensemble", choice.ensemble)
            if wanted not in ("off", kept):
                raise ValueError(f"these proposals were kept with ensemble={kept!r}: propose(..., ensemble={wanted!r})")
        return [self._decide(view["outputs"], View(*view["view"]), choice) for view in views]

    def _decide(self, proposals: dict[str, Tensor], view: View, choice: Choice) -> dict[str, Tensor]:
        """Of a view's own part: label_map (H, W), -1 where none of the labels applies. With output="map" also
        confidence (H, W), with output="masks" also totals (2, num_labels + 1), see `SemanticMap.totals`."""
        seen_by_clip = proposals.get("clip_embeds"), proposals.get("shown_to_clip")
        proposals = {name: value for name, value in proposals.items() if name not in ("clip_embeds", "shown_to_clip")}
        outputs = Zs3Output(**proposals, **self.model.classify(proposals, choice.text_embeds))
        owner = choice.owner if len(choice.owner) > len(choice.names) else None
        if owner is not None:
            outputs.class_logits = best_synonyms(outputs.class_logits, owner)
        if choice.ensemble != "off":
            outputs = self.model.ensemble(
                outputs,
                ProposalEmbeds(*seen_by_clip),
                choice.text_embeds,
                owner=owner,
                is_seen=choice.is_seen,
                weight=choice.ensemble_weight,
            )
        left, top, right, bottom = view.box
        (found,) = semantic_map(
            outputs.class_probs,
            outputs.mask_logits,
            padded_size(outputs.mask_logits),
            valid_sizes=outputs.valid_sizes,
            image_sizes=[(bottom - top, right - left)],
            return_scores=True,
        )
        label_map = found.label_map
        if choice.num_labels < len(choice.names):
            label_map = label_map.masked_fill(label_map >= choice.num_labels, -1)
        if choice.threshold is not None:
            measure = found.confidence if choice.confidence == "probability" else found.margin
            label_map = label_map.masked_fill(measure < choice.threshold, -1)
        own = view.own_part
        if choice.output == "map":
            return {"label_map": label_map[own], "confidence": found.confidence[own]}
        if view.own != view.box:  # pixels of other views get an id more, whose totals are dropped
            others = torch.full_like(label_map, choice.num_labels)
            others[own] = label_map[own]
            totals = found.totals(others, choice.num_labels + 1)[:, :-1]
        else:
            totals = found.totals(label_map, choice.num_labels)
        return {"label_map": label_map[own], "totals": totals}

    def postprocess(self, image: dict) -> dict | list[dict]:
        choice = image["choice"]
        names = choice.names[: choice.num_labels]
        label_map = np.empty(image["image_size"], dtype=np.int64)
        scores = np.empty(image["image_size"] if choice.output == "map" else 0, dtype=np.float32)
        for view, result in zip(image["views"], image["results"], strict=True):
            left, top, right, bottom = view.own
            label_map[top:bottom, left:right] = result["label_map"]
            if choice.output == "map":
                scores[top:bottom, left:right] = result["confidence"]
        if choice.output == "map":
            return {"segmentation": label_map, "labels": names, "scores": scores}
        counts, sums = sum(result["totals"] for result in image["results"]).numpy()  # -1 first
        return [
            {
                "label": NONE_OF_THESE if label_id < 0 else names[label_id],
                "label_id": label_id,
                "score": float(sums[label_id + 1] / counts[label_id + 1]),
                "mask": Image.fromarray(np.where(label_map == label_id, np.uint8(255), np.uint8(0)), mode="L"),
            }
            for label_id in (np.flatnonzero(counts) - 1).tolist()
        ]

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the model, its code and the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        processor = self.image_processor if self.processor is None else self.processor
        processor.save_pretrained(save_directory)


def _are_several(images: object) -> bool:
    """Whether the input is several images. Anything else is one image, which `load_picture` reads or refuses."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim not in (0, 2, 3)
    if isinstance(images, str | Path | Image.Image | bytes | bytearray | memoryview | Mapping | Set):
        return False
    if _are_proposals(images) or hasattr(images, "read") or hasattr(images, "column_names"):  # a file, rows of a table
        return False
    return isinstance(images, Iterable | Dataset)


def _are_proposals(image: object) -> bool:
    """By their fields: a copy of this file, as remote code has, makes them of another class."""
    return hasattr(image, "views") and hasattr(image, "outputs")


def fingerprint(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first 256 numbers of each weight of the class projection and of the first queries, float32 on the CPU. They
    tell checkpoints apart. Offloaded weights are left out."""
    parts = {"projection": model.class_projection, "queries": model.model.transformer_module.queries_features}
    weights = [(name, *pair) for name, part in parts.items() for pair in part.named_parameters()]
    return {
        f"{name}.{key}": weight.detach().flatten()[:256].float().cpu()
        for name, key, weight in weights
        if not weight.is_meta
    }


def _groups(images: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` images. If reading an image raises, the images before it are yielded first."""
    group = []
    try:
        for image in images:
            group.append(image)
            if len(group) == size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def _unchanged(image: ImageLike) -> ImageLike:
    return image


def _folder(folder: Path) -> list[Path]:
    there = sorted(file for file in folder.iterdir() if not is_leftover(file.name))
    files = [file for file in there if is_picture_name(file.name)]
    others = [file.name for file in there if not is_picture_name(file.name) and not file.is_dir()]
    if files and others:
        logger.warning(f"left out of {folder}, as they are no pictures: {shortened(others)}")
    if not files:
        raise ValueError(f"{shown_name(folder)} holds no images ({', '.join(PICTURE_SUFFIXES)})")
    return files


def _views(width: int, height: int, window: int | None, overlap: int | None) -> list[View]:
    """The windows of an image, row by row. The border between two neighbours is the middle of their overlap."""
    if window is None:
        if overlap is not None:
            raise ValueError("overlap needs a window")
        window, overlap = max(width, height), 0
    overlap = window // 4 if overlap is None else overlap
    if overlap >= window:
        raise ValueError(f"overlap must be less than a window's side, got overlap={overlap} and window={window}")
    columns, rows = _cuts(width, window, overlap), _cuts(height, window, overlap)
    return [
        View((left, top, right, bottom), (own_left, own_top, own_right, own_bottom))
        for top, bottom, own_top, own_bottom in rows
        for left, right, own_left, own_right in columns
    ]


def _cuts(length: int, window: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Along one axis: start and end of each window, and of its own part."""
    count = 1 if length <= window else -(-(length - overlap) // (window - overlap))
    starts = [(length - window) * place // max(1, count - 1) for place in range(count)]
    ends = [min(length, start + window) for start in starts]
    lines = [0, *((end + start) // 2 for end, start in zip(ends, starts[1:], strict=False)), length]
    return list(zip(starts, ends, lines, lines[1:], strict=False))


__all__ = ["Proposals", "View", "Zs3Pipeline"]
