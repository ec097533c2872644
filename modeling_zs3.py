"""Zs3ForSemanticSegmentation: Mask2Former whose queries are classified by frozen CLIP text vectors (paper, Fig. 2).

Three values flow through the project:
    batch (data -> model): pixel_values (B, 3, H, W), pixel_mask (B, H, W), labels (B, H, W) ids with -1 ignored,
        image_labels (B, C) int8: 1 present, 0 absent, -1 unknown; text_embeds (C, D), unit length.
    output (model -> anyone): Zs3Output, see outputs_zs3.
    label map (processor -> user): (H, W) int64, indices into the class names given.
label_maps_zs3 makes label maps of proposals (Eq. 4), clip_views_zs3 shows proposals to CLIP (sections 3.4 and 4.6).

Axes: B image, Q query, C class name, D embedding, T template, L token, H W input size, h w mask size (H/4, W/4).
"""

import copy
import os
import stat
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput

try:
    from .clip_views_zs3 import (
        MASK_THRESHOLD,
        Fill,
        ProposalEmbeds,
        clip_probabilities,
        crop_proposals,
        embed_proposals,
        ensemble_with_clip,
        to_rgb,
    )
    from .configuration_zs3 import SIZE_DIVISOR, TINY, Refused, RegionView, Zs3Config, among, as_number
    from .encoders_zs3 import check_towers, load_encoder, load_into, new_tower, vector_size
    from .label_maps_zs3 import MASK_STRIDE, semantic_map, semantic_scores
    from .losses_zs3 import PADDING, Targets, default_image_labels, mask_ids, zs3_losses
    from .network_zs3 import batch_norms, call_every_layer, decoder_outputs, run_plainly, transformers_outputs
    from .outputs_zs3 import (
        Zs3Output,
        check_finite_output,
        cosine_similarity,
        label_similarity,
        own_probabilities,
        tie,
    )
    from .pipeline_zs3 import Zs3Pipeline  # so that its code travels with the weights
    from .processing_zs3 import saved_processor
    from .text_zs3 import ClassName, check_text_embeds, embed_labels, embed_prompts, read_labels
except ImportError:
    if __package__:
        raise
    from clip_views_zs3 import (
        MASK_THRESHOLD,
        Fill,
        ProposalEmbeds,
        clip_probabilities,
        crop_proposals,
        embed_proposals,
        ensemble_with_clip,
        to_rgb,
    )
    from configuration_zs3 import SIZE_DIVISOR, TINY, Refused, RegionView, Zs3Config, among, as_number
    from encoders_zs3 import check_towers, load_encoder, load_into, new_tower, vector_size
    from label_maps_zs3 import MASK_STRIDE, semantic_map, semantic_scores
    from losses_zs3 import PADDING, Targets, default_image_labels, mask_ids, zs3_losses
    from network_zs3 import batch_norms, call_every_layer, decoder_outputs, run_plainly, transformers_outputs
    from outputs_zs3 import (
        Zs3Output,
        check_finite_output,
        cosine_similarity,
        label_similarity,
        own_probabilities,
        tie,
    )
    from pipeline_zs3 import Zs3Pipeline  # so that its code travels with the weights
    from processing_zs3 import saved_processor
    from text_zs3 import ClassName, check_text_embeds, embed_labels, embed_prompts, read_labels


AUTO_MAP = {
    "AutoConfig": "configuration_zs3.Zs3Config",
    "AutoModel": "modeling_zs3.Zs3ForSemanticSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_zs3.Zs3ForSemanticSegmentation",
    "AutoModelForUniversalSegmentation": "modeling_zs3.Zs3ForSemanticSegmentation",
}
CUSTOM_PIPELINES = {
    "zero-shot-semantic-segmentation": {
        "impl": "pipeline_zs3.Zs3Pipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


# Fields of Zs3Config that go with its network into another checkpoint: what its training saw, and in which colours.
OWN_FIELDS = (
    *("seen_class_names", "unseen_labels", "image_label_precision", "image_label_recall"),
    *("pixel_mean", "pixel_std"),
)


class Zs3PreTrainedModel(Mask2FormerPreTrainedModel):
    config: Zs3Config
    config_class = Zs3Config
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    # Weights that are left out where this model has none: a plain Mask2Former's heads, a baseline's background.
    _keys_to_ignore_on_load_unexpected = [r"^class_predictor\.", r"^criterion\.", r"^background_embed$"]

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Zs3ForSemanticSegmentation) and module.background_embed is not None:
            # As in Xu et al. 2021 (std = width^-0.5); only its direction counts.
            init.normal_(module.background_embed, std=self.config.projection_dim**-0.5)
        if isinstance(module, Zs3ForSemanticSegmentation) and module.vocabulary is not None:
            init.zeros_(module.vocabulary)


def draw_as_mask2former(network: Mask2FormerModel) -> None:
    """Draws level and query embeddings and the mask MLP by PyTorch's default, as Mask2Former's own code does.

    transformers does so from 5.23 on, and nothing is done then. Older versions make them zeros or small numbers, with
    which training from scratch learns much less.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        return
    transformer = network.transformer_module
    embeddings = transformer.queries_embedder, transformer.queries_features, transformer.level_embed
    for module in (*embeddings, *transformer.decoder.mask_predictor.modules()):
        if isinstance(module, nn.Embedding | nn.Linear):
            module.reset_parameters()
    nn.init.normal_(network.pixel_level_module.decoder.level_embed)


class Zs3ForSemanticSegmentation(Zs3PreTrainedModel):
    """Mask proposals and their class embeddings, classified by cosine with the text vectors of any label list."""

    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # of the layers of the whole visual part, see `network_zs3`

    def __init__(self, config: Zs3Config):
        super().__init__(config)
        check_towers(config.text_config, config.vision_config, config.projection_dim)
        self.model = Mask2FormerModel(config)
        draw_as_mask2former(self.model)
        call_every_layer(self.model)
        self.class_projection = class_projection(config.hidden_dim, config.projection_dim, config.class_projection)
        self.class_predictor = None
        if config.proposal_classes:
            self.class_predictor = nn.Linear(config.hidden_dim, config.proposal_classes + 1)  # the last: no object
        self.text_model = None if config.text_config is None else new_tower(config.text_config)
        self.vision_model = None if config.vision_config is None else new_tower(config.vision_config)
        size = config.projection_dim
        self.background_embed = nn.Parameter(torch.empty(size)) if config.class_loss == "cross_entropy" else None
        stored = None if config.class_names is None else torch.zeros(len(config.class_names), size)
        self.register_buffer("vocabulary", stored)
        self.norms_are_frozen = False
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> "Zs3ForSemanticSegmentation":
        """As in PyTorch, but the encoder and the class predictor stay frozen, also after `from_pretrained`."""
        super().train(mode)
        for frozen in (self.text_model, self.vision_model, self.class_predictor):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        if self.norms_are_frozen:
            for norm in batch_norms(self.model.pixel_level_module.encoder):
                norm.requires_grad_(False).eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embeddings; raises NotImplementedError without a tower."""
        if self.text_model is None:
            raise NotImplementedError("this model has no text tower, and so no token embeddings")
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As `get_input_embeddings`."""
        if self.text_model is None:
            raise NotImplementedError("this model has no text tower, and so no token embeddings")
        self.text_model.set_input_embeddings(value)

    def enable_input_require_grads(self) -> None:
        """Token embeddings, as in other models, and the backbone's feature maps require gradients from now on. Without
        it, reentrant checkpointing gives no gradients to adapters in a frozen model."""
        if getattr(self, "_require_grads_hooks", None):
            self.disable_input_require_grads()
        super().enable_input_require_grads()
        hook = self.model.pixel_level_module.encoder.register_forward_hook(require_gradients)
        self._require_grads_hooks.append(hook)

    def freeze_backbone_norms(self) -> None:
        """From now on the backbone's batch norms do not learn, as in Mask2Former: neither statistics nor scale and
        shift. A ResNet then trains in less time and memory."""
        self.norms_are_frozen = True
        self.train(self.training)

    # ------------------------------------------------------------------------------------------- making

    @classmethod
    def from_mask2former_clip_pretrained(
        cls, mask2former: str | None, clip: str | None, *, backbone: str | None = None, **config_overrides
    ) -> "Zs3ForSemanticSegmentation":
        """Join two checkpoints, each a Hub id or a local folder, into a model ready for zero-shot training.

        mask2former: gives its weights, or None. Published ones were trained on the masks of COCO or ADE20K, unseen
            classes included: no zero-shot result can be claimed after such a start. A checkpoint of this class, too:
            its network without its class head, and the record of the classes that it saw.
        clip: gives its text and image towers, which stay frozen: a CLIP, or an encoder of another family of
            encoders_zs3; None: text vectors come from outside.
        backbone: with mask2former=None, a backbone checkpoint (ImageNet) to start from; the rest is random.
        config_overrides: fields of Zs3Config; `text_config=None` or `vision_config=None` leaves a tower out. With
            class_head "regions", and with other encoders than CLIP, clip_logit_scale is the encoder's own scale.
        """
        if mask2former is not None and backbone is not None:
            raise ValueError("give mask2former or backbone, not both: a Mask2Former brings its own backbone")
        fields = {}
        if mask2former is not None:
            source_config = proposal_config(mask2former)
            known = {*Mask2FormerConfig.__dataclass_fields__, *OWN_FIELDS} - {"id2label", "label2id", "architectures"}
            fields = {name: value for name, value in source_config.to_dict().items() if name in known}
        if backbone is not None:
            fields["backbone_config"] = AutoConfig.from_pretrained(
                backbone, trust_remote_code=False, out_features=["stage1", "stage2", "stage3", "stage4"]
            )
        if clip is not None:
            encoder = load_encoder(clip)
            fields["projection_dim"] = vector_size(encoder.text_model.config)
            fields["text_config"] = encoder.text_model.config.to_dict()
            fields["vision_config"] = encoder.vision_model.config.to_dict()
            if (
                config_overrides.get("class_head") == "regions"
                or encoder.text_model.config.model_type != "clip_text_model"
            ):
                fields["clip_logit_scale"] = encoder.scale
        config = Zs3Config(**{"head_is_trained": False, **fields, **config_overrides})

        model = cls(config)
        if mask2former is not None:
            whole = Mask2FormerForUniversalSegmentation if config.proposal_classes else Mask2FormerModel
            kind = cls if isinstance(source_config, Zs3Config) else whole
            options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
            source, loading = kind.from_pretrained(mask2former, **options)
            lost = sorted(name for name in loading["missing_keys"] if not name.startswith("criterion."))
            if lost:
                raise ValueError(f"weights of the network are missing ({lost[0]}) in {mask2former}")
            load_into(model.model, source if kind is Mask2FormerModel else source.model)
            if config.proposal_classes:
                load_into(model.class_predictor, source.class_predictor)
        if backbone is not None:
            own = model.model.pixel_level_module.encoder
            weights = type(own).from_pretrained(backbone, config=config.backbone_config, dtype=torch.float32)
            load_into(own, weights)
        if clip is not None:
            for tower, its in ((model.text_model, encoder.text_model), (model.vision_model, encoder.vision_model)):
                if tower is not None:
                    load_into(tower, its)
        return model

    def set_vocabulary(
        self,
        class_names: Sequence[ClassName],
        text_embeds: Tensor | None = None,
        *,
        processor: ProcessorMixin | None = None,
    ) -> None:
        """Store a default label list in the checkpoint, used when `forward` gets no text.

        class_names: entries as `read_labels` takes them; their names are stored.
        text_embeds: (C, D), one row a name; normalised here. None: the text tower embeds the names' prompts.
        processor: the Zs3Processor that makes these prompts; None: the one beside this model's checkpoint.
        """
        names = [label.name for label in read_labels(class_names)]
        if text_embeds is None:
            text_embeds = self._embed_names(class_names, processor)
        check_text_embeds(text_embeds, self.config.projection_dim)
        if len(text_embeds) != len(names):
            raise ValueError(f"text_embeds must have a row for each of {len(names)} names, got {len(text_embeds)}")
        self.config.class_names = names
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: index for index, name in enumerate(names)}
        self.vocabulary = self._placed(F.normalize(text_embeds.detach().float(), dim=-1).contiguous())

    def _embed_names(self, class_names: Sequence[ClassName], processor: ProcessorMixin | None) -> Tensor:
        """(C, D), of the names' prompts."""
        if self.text_model is None:
            raise ValueError("this checkpoint has no text tower to embed class names with: pass text_embeds")
        if processor is None:
            processor = self._saved_processor()
        if not hasattr(processor, "prompt_templates"):
            kind = type(processor).__name__
            raise ValueError(f"a Zs3Processor turns class names into prompts, not a {kind}: pass processor=")
        return embed_labels(read_labels(class_names, processor.prompt_templates), self, processor)

    def _saved_processor(self) -> ProcessorMixin:
        """The processor beside the checkpoint that this model was loaded from, of this project's classes."""
        source = self.config.name_or_path
        if not source:
            raise ValueError("this model was not loaded from a checkpoint with a processor: pass processor=")
        revision = getattr(self.config, "_commit_hash", None) or "main"
        try:
            return saved_processor(source, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"the processor of {source} cannot be loaded here: pass processor=") from error

    def without_towers(self, *towers: str) -> "Zs3ForSemanticSegmentation":
        """This model without its "text_model" or "vision_model": another object, the same weights."""
        part = copy.copy(self)
        part._modules = {**self._modules, **dict.fromkeys(towers)}
        part._parameters, part._buffers = dict(self._parameters), dict(self._buffers)
        part.config = copy.deepcopy(self.config)
        for tower in towers:
            setattr(part.config, tower.replace("_model", "_config"), None)
        return part

    def save_pretrained(self, save_directory: str, *, drop_text_tower: bool = False, **kwargs) -> None:
        """Save weights, config and the code that loads them, the pipeline's included.

        drop_text_tower: save no text tower; the saved model then knows the stored vocabulary only.
        """
        model = self
        if drop_text_tower:
            if self.vocabulary is None:
                raise ValueError("without a text tower a checkpoint needs label vectors: call set_vocabulary first")
            model = self.without_towers("text_model")
            if kwargs.get("state_dict") is not None:
                weights = kwargs["state_dict"].items()
                kwargs["state_dict"] = {k: v for k, v in weights if not k.startswith("text_model.")}
        model.config.auto_map = dict(AUTO_MAP)
        model.config.custom_pipelines = dict(CUSTOM_PIPELINES)
        for name in model.config.sub_configs:  # the code of a part's own checkpoint does not belong to this one
            for key in ("auto_map", "custom_pipelines"):
                if hasattr(getattr(model.config, name), key):
                    delattr(getattr(model.config, name), key)
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(Zs3Pipeline, save_directory)  # before the weights, with which the folder may be uploaded
        Zs3PreTrainedModel.save_pretrained(model, save_directory, **kwargs)
        let_others_read(save_directory)

    # ------------------------------------------------------------------------------------------- running

    @torch.no_grad()
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text vectors of class names: (C, L), or (C, T, L) for T prompts a class -> (C, D), unit length.

        Every prompt is embedded and normalised; the prompts of a class are averaged and normalised again. A prompt
        does not exist where its mask is all zero.
        """
        if self.text_model is None:
            raise ValueError(
                "this checkpoint has no text tower: pass text_embeds, or no text at all to use its stored vocabulary"
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = embed_prompts(self.text_model, self._placed(input_ids), self._placed(attention_mask))
        check_text_embeds(embeds, self.config.projection_dim)
        return F.normalize(embeds, dim=-1)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_labels: Tensor | None = None,
        is_seen: Tensor | None = None,
        target_counts: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Zs3Output | tuple:
        """Mask proposals, their class embeddings, and with `labels` the loss of Eq. 8.

        pixel_values: (B, 3, H, W), normalised. pixel_mask: (B, H, W), 1 on the image, 0 on padding.
        text_embeds (C, D), or input_ids (C, L) or (C, T, L) with attention_mask; neither: the stored vocabulary.
        labels: (B, H, W), every distinct id >= 0 is one mask target, -1 is ignored. With `matching` "joint" or
            "hybrid", or a label_map_weight, the ids index the class axis.
        image_labels: (B, C), 1 present, 0 absent, -1 unknown. None: from `labels` (see `default_image_labels`).
        is_seen: (C,) bool, only for that default.
        target_counts: (3,), see `count_targets`; for a batch that is a part of a larger one.
        output_hidden_states, output_attentions: also return these, see Zs3Output; transformers' own forward then runs.
            None takes the config's value.
        return_dict: False returns the values as a tuple, without those that are None. None takes the config's value.
        """
        config = self.config
        looks = {
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
        }
        text_embeds = self._text_embeds(text_embeds, input_ids, attention_mask)
        if labels is None:
            self.check_head()
            proposals = self.propose(pixel_values, pixel_mask, **looks)
            outputs = Zs3Output(**proposals, **self.classify(proposals, text_embeds))
        else:
            check_labels(labels, pixel_values)
            labels = labels.long() if pixel_mask is None else labels.long().masked_fill(pixel_mask == 0, PADDING)
            targets = self._targets(labels, image_labels, is_seen, len(text_embeds))
            outputs = self._outputs_with_loss(pixel_values, text_embeds, targets, target_counts, **looks)
        return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def _outputs_with_loss(
        self, pixel_values: Tensor, text_embeds: Tensor, targets: Targets, target_counts: Tensor | None, **looks: bool
    ) -> Zs3Output:
        """looks: as in `_proposals`."""
        if self.config.class_head != "learned":
            raise Refused("class_head 'regions' learns nothing: set config.class_head = 'learned' to train")
        if self.training and not self.config.head_is_trained:
            self.config.head_is_trained = True
        mask_logits, class_embeds, states = self._proposals(pixel_values, self.config.use_auxiliary_loss, **looks)
        similarity = [cosine_similarity(embeds, text_embeds) for embeds in class_embeds]
        background = [self._background_similarity(embeds) for embeds in class_embeds]
        losses = zs3_losses(mask_logits, similarity, background, targets, self.config, target_counts)
        weights = {
            "class": self.config.class_weight,
            "mask": self.config.mask_weight,
            "dice": self.config.dice_weight,
            "rank": self.config.rank_weight,
            "label_map": self.config.label_map_weight,
        }
        labels = targets.labels
        return Zs3Output(
            loss=sum(weights[name] * term for name, term in losses.terms.items()),  # Eq. 8
            loss_terms=losses.terms,
            same_label_rate=losses.same_label_rate,
            mask_logits=mask_logits[-1],
            class_embeds=class_embeds[-1],
            valid_sizes=labels.new_tensor([labels.shape[1:]], dtype=torch.int64).repeat(len(labels), 1),
            **self.classify({"class_embeds": class_embeds[-1]}, text_embeds),
            **states,
        )

    def _targets(
        self, labels: Tensor, image_labels: Tensor | None, is_seen: Tensor | None, num_classes: int
    ) -> Targets:
        """The targets of the losses. The ids of `labels` are read on the CPU; a GPU waits for it."""
        ids = mask_ids(labels)
        largest = max((int(values[-1]) for values in ids if len(values)), default=-1)
        free = self.config.matching == "unpaired" and not self.config.label_map_weight
        if largest >= num_classes and (not free or image_labels is None):
            joined = f"with matching {self.config.matching!r} ids index the class axis"
            if self.config.matching == "unpaired":
                joined = "with a label_map_weight ids index the class axis"
            mend = "pass image_labels" if free else joined
            raise ValueError(f"labels hold id {largest}, but there are {num_classes} classes: {mend}")
        if image_labels is None:
            is_seen = None if is_seen is None else checked_is_seen(is_seen, num_classes)
            image_labels = default_image_labels(ids, num_classes, is_seen)
        image_labels = checked_image_labels(image_labels, (len(labels), num_classes))
        if not free:
            check_masks_are_present(ids, image_labels)
        return Targets(labels, ids, image_labels)

    def _text_embeds(
        self, text_embeds: Tensor | None, input_ids: Tensor | None, mask: Tensor | None, size: int | None = None
    ) -> Tensor:
        """(C, D), unit length, from the source that was given. size: D of another encoder."""
        if text_embeds is not None and input_ids is not None:
            raise ValueError("pass text_embeds or input_ids, not both")
        if input_ids is not None:
            return self.encode_text(input_ids, mask)
        if text_embeds is None:
            if self.vocabulary is None:
                raise ValueError(
                    "no text: pass text_embeds or input_ids, or store a label list with model.set_vocabulary(...)"
                )
            text_embeds = self.vocabulary
        check_text_embeds(text_embeds, size or self.config.projection_dim)
        return F.normalize(self._placed(text_embeds).float(), dim=-1)

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device. Unchanged if accelerate loads weights layer by layer (device "meta")."""
        return tensor if self.device.type == "meta" else tensor.to(self.device)

    def _proposals(
        self, pixel_values: Tensor, every: bool, hidden_states: bool = False, attentions: bool = False
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor | tuple]]:
        """Mask logits (B, Q, h, w) and class embeddings (B, Q, D): of every decoder output, or of the last one.

        Third: the fields of Zs3Output that hidden_states and attentions ask for, and the objectness.
        """
        if hidden_states or attentions:
            outputs, inside = transformers_outputs(self.model, pixel_values, every, attentions)
            names = [name for name in Zs3Output.__dataclass_fields__ if inside.get(name) is not None]
            states = {name: inside[name] for name in names if hidden_states or not name.endswith("_hidden_states")}
        else:
            run = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else run_plainly
            outputs, states = decoder_outputs(self.model, pixel_values, every, run), {}
        if self.config.objectness:
            with torch.no_grad():
                states["objectness"] = 1 - self.class_predictor(outputs.hidden[-1]).float().softmax(-1)[..., -1]
        return outputs.mask_logits, [self.class_projection(hidden) for hidden in outputs.hidden], states

    def propose(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        *,
        hidden_states: bool = False,
        attentions: bool = False,
    ) -> dict[str, Tensor | tuple]:
        """The part of `forward` that needs no text. Each image is run at its own size, whatever its batch.

        Returns mask_logits (B, Q, h, w), class_embeds (B, Q, D) and valid_sizes (B, 2), see Zs3Output; region_embeds
        and objectness, if the config has them; also hidden states or attentions, if asked for. These raise ValueError
        for images of different sizes.
        """
        batch, _, height, width = pixel_values.shape
        if pixel_mask is None:
            valid_sizes = pixel_values.new_tensor([[height, width]], dtype=torch.int64).repeat(batch, 1)
            sizes = [[height, width]] * batch
        else:
            check_shape("pixel_mask", pixel_mask, (batch, height, width), "as pixel_values")
            valid_sizes = torch.stack([pixel_mask.bool().any(2).sum(1), pixel_mask.bool().any(1).sum(1)], dim=1)
            sizes = valid_sizes.tolist()
        if any(0 in size for size in sizes):
            raise ValueError("pixel_mask hides a whole image: it must be 1 where the image is")
        own_sizes = [tuple(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size) for size in sizes]
        mask_height, mask_width = (max(sides) // MASK_STRIDE for sides in zip(*own_sizes, strict=True))
        if (hidden_states or attentions) and len(set(own_sizes)) > 1:
            raise ValueError(
                f"hidden states and attentions are for images of one size, got {len(set(own_sizes))} sizes: "
                "pass images of one size at once"
            )
        made: dict[str, list[Tensor]] = {}
        for size in dict.fromkeys(own_sizes):
            same = [image for image in range(batch) if own_sizes[image] == size]
            pixels = pixel_values[same, :, : size[0], : size[1]]
            pixels = F.pad(pixels, (0, size[1] - pixels.shape[3], 0, size[0] - pixels.shape[2]))
            logits, embeds, states = self._proposals(pixels, False, hidden_states, attentions)
            # Edge values continue into the padding: upsampling then gives what it gives without padding.
            margin = (0, mask_width - logits[-1].shape[3], 0, mask_height - logits[-1].shape[2])
            padded = F.pad(logits[-1], margin, mode="replicate")
            values = {"mask_logits": padded, "class_embeds": embeds[-1]}
            if "objectness" in states:
                values["objectness"] = states.pop("objectness")
            for name, rows in values.items():
                for image, row in zip(same, rows, strict=True):
                    made.setdefault(name, [None] * batch)[image] = row
        proposals = {name: torch.stack(rows) for name, rows in made.items()}
        for name, rows in proposals.items():
            check_finite_output(name, rows)
        proposals["valid_sizes"] = valid_sizes
        if self.config.class_head == "regions":
            images = to_rgb(pixel_values, self.config.pixel_mean, self.config.pixel_std)
            view = self.config.region_view
            seen = self.embed_proposals(images, proposals["mask_logits"], valid_sizes, view=view)
            proposals["region_embeds"] = seen.embeds
        return {**proposals, **states}

    def embed_proposals(
        self,
        images: Tensor,
        mask_logits: Tensor,
        valid_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        *,
        view: RegionView = "crops",
        mask_threshold: float = MASK_THRESHOLD,
        fill: Fill = "mean",
        chosen: Tensor | None = None,
    ) -> ProposalEmbeds:
        """The image tower's embeddings of proposals: see `embed_proposals` of clip_views_zs3.

        images: (B, 3, H, W) RGB in [0, 1]; the image processor's `to_rgb` makes them of `pixel_values`.
        """
        if self.vision_model is None:
            raise ValueError("this checkpoint has no image tower: it cannot be shown proposals")
        options = {"view": view, "mask_threshold": mask_threshold, "fill": fill, "chosen": chosen}
        options["patch_tokens"] = self.config.patch_tokens
        return embed_proposals(self.vision_model, images, mask_logits, valid_sizes, **options)

    @torch.no_grad()
    def ensemble(
        self,
        outputs: Zs3Output,
        proposals: ProposalEmbeds,
        text_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        owner: Tensor | None = None,
        is_seen: Tensor | None = None,
        weight: float | None = None,
        logit_scale: float | None = None,
    ) -> Zs3Output:
        """The outputs with class probabilities that join CLIP's view of the proposals with the model's (section 4.6).

        proposals: `embed_proposals(images, outputs.mask_logits, outputs.valid_sizes)`, of the same images.
        text_embeds, or input_ids and attention_mask: the same label list as in `forward`.
        owner: (S,) int64, where text_embeds has a row for each of S synonyms of C classes: see `best_synonyms`.
        is_seen: (C,) bool; None: the seen classes of the stored vocabulary.
        weight: w; None: the config's clip_ensemble_weight.
        logit_scale: of another encoder, whose proposals and text_embeds are given; None: this checkpoint's own.
        """
        if not hasattr(proposals, "embeds"):
            mend = "give it model.embed_proposals(images, outputs.mask_logits, outputs.valid_sizes)"
            raise Refused(f"ensemble needs CLIP's embeddings of the proposals, got {type(proposals).__name__}: {mend}")
        stored = text_embeds is None and input_ids is None
        weight = self.config.clip_ensemble_weight if weight is None else weight
        if weight is None:
            raise ValueError("this checkpoint's clip_ensemble_weight is None, do not ensemble: pass weight to do it")
        weight = as_number("weight", weight, 0, 1)
        if logit_scale is not None and text_embeds is None:
            raise ValueError("with logit_scale pass text_embeds, those of the encoder that embedded the proposals")
        size = None if logit_scale is None else proposals.embeds.shape[2]
        logit_scale = self.config.clip_logit_scale if logit_scale is None else logit_scale
        logit_scale = as_number("logit_scale", logit_scale, TINY)
        text_embeds = self._text_embeds(text_embeds, input_ids, attention_mask, size)
        num_classes = outputs.class_logits.shape[2]
        if owner is None:
            check_shape("text_embeds", text_embeds, (num_classes, text_embeds.shape[1]), "a row for each name")
        is_seen = self._is_seen(is_seen, num_classes, stored)
        own = own_probabilities(outputs)
        its = clip_probabilities(proposals, text_embeds, logit_scale, owner)
        probs = ensemble_with_clip(own, its, is_seen, weight)
        probs = tie(probs, torch.cat([own.flatten(0, 1), its.flatten(0, 1), is_seen[None].to(own)]))
        return Zs3Output(**{**outputs, "ensemble_probs": probs, "shown_to_clip": proposals.shown})

    def ensemble_view(self, view: str | None = None, weight: float | None = None) -> str:
        """The view of the ensemble, or "off". None: "crops" where a weight is given, or where the checkpoint has an
        image tower, a weight and a record of the classes that its training saw. Raises where it cannot ensemble."""
        lacks = None
        if self.config.vision_config is None:
            lacks = "the checkpoint has no image tower"
        elif self.config.seen_class_names is None:
            lacks = "the checkpoint does not say which classes its training saw masks of"
        elif self.config.clip_ensemble_weight is None and weight is None:
            lacks = "the checkpoint says not to (its clip_ensemble_weight is None), give ensemble_weight to do it"
        if view == "off" or (view is None and weight is None and lacks):
            return "off"
        if lacks:
            raise ValueError(f"no ensemble: {lacks}")
        return view or "crops"

    def _is_seen(self, is_seen: Tensor | None, num_classes: int, stored: bool) -> Tensor:
        """(C,) bool: as given, or the seen classes of the stored vocabulary."""
        if is_seen is None:
            names, trained = self.config.class_names, self.config.seen_class_names
            if names is None or trained is None or not stored:
                raise ValueError("pass is_seen, (C,) bool: the checkpoint does not say which classes are seen")
            is_seen = torch.tensor(among(names, trained))
        return self._placed(checked_is_seen(is_seen, num_classes))

    def _background_similarity(self, class_embeds: Tensor) -> Tensor | None:
        if self.background_embed is None:
            return None
        return cosine_similarity(class_embeds, self.background_embed[None])[..., 0]

    def check_head(self) -> None:
        """Raises Refused where names would mean nothing, because the learned head was never trained."""
        if self.config.class_head == "learned" and not self.config.head_is_trained:
            raise Refused(
                "the class head was never trained, so its names would mean nothing: train this checkpoint, or join its "
                "parts with `zs3 assemble`, which names without training"
            )

    def classify(self, proposals: Mapping[str, Tensor], text_embeds: Tensor) -> dict[str, Tensor | None]:
        """The part of `forward` that needs a label list: class_logits and background_logits, see Zs3Output.

        proposals: class_embeds (B, Q, D), or with class_head "regions" region_embeds (B, Q, D); text_embeds: (C, D).
        """
        if self.config.class_head == "regions":
            cosines = label_similarity(proposals["region_embeds"], text_embeds)
            return {"class_logits": self.config.clip_logit_scale * cosines, "background_logits": None}
        class_embeds = proposals["class_embeds"]
        background = self._background_similarity(class_embeds)
        similarity = cosine_similarity if self.training else label_similarity  # ties do not matter in training
        temperature = self.config.class_temperature
        return {
            "class_logits": similarity(class_embeds, text_embeds) / temperature,
            "background_logits": None if background is None else background / temperature,
        }


def require_gradients(backbone: nn.Module, inputs: tuple, outputs: ModelOutput) -> None:
    """A forward hook of the backbone."""
    for feature_map in outputs.feature_maps:
        feature_map.requires_grad_(True)


def let_others_read(folder: str) -> None:
    """Gives weight files the rights of config.json: safetensors makes files that only their owner can read."""
    config = os.path.join(folder, "config.json")
    for name in os.listdir(folder) if os.path.isfile(config) else ():
        if name.endswith(".safetensors"):
            os.chmod(os.path.join(folder, name), stat.S_IMODE(os.stat(config).st_mode))


def proposal_config(source: str) -> PreTrainedConfig:
    """The configuration of a Mask2Former, or of a checkpoint of this project."""
    own = PreTrainedConfig.get_config_dict(source)[0].get("model_type") == Zs3Config.model_type
    return (Zs3Config if own else AutoConfig).from_pretrained(source, trust_remote_code=False)


def class_projection(hidden_dim: int, projection_dim: int, kind: str) -> nn.Module:
    """The layer that makes the class embeddings E^c (Fig. 2). MLP as in Xu et al. 2021, or one linear layer."""
    if kind == "linear":
        return nn.Linear(hidden_dim, projection_dim)
    return nn.Sequential(nn.Linear(hidden_dim, 4 * hidden_dim), nn.ReLU(), nn.Linear(4 * hidden_dim, projection_dim))


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], words: str = "") -> None:
    """Raises Refused where a value is no tensor of this shape. words: where the shape comes from."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Refused(f"{name} must be {shape}, {words + ', ' if words else ''}got {kind}")


def check_labels(labels: Tensor, pixel_values: Tensor) -> None:
    """Raises Refused where label maps are no (B, H, W) integers of the images' size."""
    batch, _, height, width = pixel_values.shape
    whole = isinstance(labels, Tensor) and not (labels.dtype.is_floating_point or labels.dtype.is_complex)
    if not whole or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise Refused(f"labels must be a tensor of whole numbers, got {kind}")
    check_shape("labels", labels, (batch, height, width), "as pixel_values")


def checked_image_labels(image_labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, C) int8 on the CPU. Raises Refused where they are not of this shape, or hold anything but 1, 0 and -1."""
    check_shape("image_labels", image_labels, shape, "a column for each class name")
    image_labels = image_labels.cpu()
    known = (image_labels == 1) | (image_labels == 0) | (image_labels == -1)
    if not known.all():
        wrong = image_labels[~known][0].item()
        raise Refused(f"image_labels must be 1 (present), 0 (absent) or -1 (unknown), got {wrong}")
    return image_labels.to(torch.int8)


def checked_is_seen(is_seen: Tensor, num_classes: int) -> Tensor:
    """(C,) bool. Raises Refused where it is no tensor of this shape."""
    check_shape("is_seen", is_seen, (num_classes,))
    return is_seen.bool()


def check_masks_are_present(ids: list[Tensor], image_labels: Tensor) -> None:
    """Raises Refused where a class has a mask (ids: B times (M,)) and image labels (B, C) that say it is absent."""
    for image, (own, labels) in enumerate(zip(ids, image_labels, strict=True)):
        absent = own[labels[own] == 0]
        if len(absent):
            raise Refused(f"class {int(absent[0])} has a mask in image {image}, whose image_labels say it is absent")


Zs3ForSemanticSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "Zs3ForSemanticSegmentation",
    "Zs3Output",
    "Zs3PreTrainedModel",
    "cosine_similarity",
    "crop_proposals",
    "ensemble_with_clip",
    "semantic_map",
    "semantic_scores",
]
