"""What the model returns, and its equations that need no network: cosines, the probabilities of Eq. 2, ties.

Axes: B image, Q query, C class name, S synonym, D embedding, h w mask size (H/4, W/4).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import ModelOutput

try:
    from .configuration_zs3 import Refused
    from .label_maps_zs3 import Explanation, explain
except ImportError:
    if __package__:
        raise
    from configuration_zs3 import Refused
    from label_maps_zs3 import Explanation, explain


@dataclass
class Zs3Output(ModelOutput):
    """What the model returns.

    loss: scalar, where `labels` are given: the sum of weight x term (Eq. 8).
    loss_terms: dict of unweighted scalars class, mask, dice, rank, each summed over the decoder outputs.
    same_label_rate: scalar in [0, 1], how often a query's label is the class of its mask (last decoder output); NaN
        without masks. It is meaningful only where the ids in `labels` index the class axis.
    mask_logits: (B, Q, h, w) of the last decoder output; sigmoid gives the proposals M.
    class_embeds: (B, Q, D), E^c, not normalised.
    class_logits: (B, Q, C), cosine / temperature.
    background_logits: (B, Q), of the learned background embedding; None without one (see `class_loss`).
    region_embeds: (B, Q, D), what the image tower sees of the proposals, unit length; with class_head "regions".
    objectness: (B, Q) in [0, 1], 1 - the probability of "no object"; None without `objectness` in the config.
    valid_sizes: (B, 2) int64, height and width of each image without its padding; with `labels`, of the whole crop.
    ensemble_probs: (B, Q, C), class probabilities of the ensemble with CLIP; the label map is then made of these.
    shown_to_clip: (B, Q) bool, the proposals that CLIP was shown.

    With output_hidden_states or output_attentions, named as in Mask2Former (C channels, h w of each level):
    encoder_last_hidden_state: (B, C, h, w), the backbone's coarsest feature map.
    pixel_decoder_last_hidden_state: (B, C, h, w), the mask features, of stride 4.
    transformer_decoder_last_hidden_state: (B, Q, C), the queries after the last layer, not normalised.

    With output_hidden_states:
    encoder_hidden_states: the backbone's feature maps (B, C, h, w), of strides 4, 8, 16, 32.
    pixel_decoder_hidden_states: feature maps (B, C, h, w), of strides 32, 16, 8.
    transformer_decoder_hidden_states: the queries (Q, B, C), before the first and after each decoder layer.

    With output_attentions:
    attentions: for each decoder layer the weights (B, heads, Q, Q) with which queries look at each other.
    """

    loss: Tensor | None = None
    loss_terms: dict[str, Tensor] | None = None
    same_label_rate: Tensor | None = None
    mask_logits: Tensor | None = None
    class_embeds: Tensor | None = None
    class_logits: Tensor | None = None
    background_logits: Tensor | None = None
    region_embeds: Tensor | None = None
    objectness: Tensor | None = None
    valid_sizes: Tensor | None = None
    ensemble_probs: Tensor | None = None
    shown_to_clip: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def class_probs(self) -> Tensor:
        """(B, Q, C), the weights of the masks in Eq. 4: the ensemble's where there is one, else p_q of Eq. 2, times the
        objectness."""
        return final_probabilities(self)

    def explain(self, y: int, x: int, *, image: int = 0, image_size: tuple[int, int] | None = None) -> Explanation:
        """Which proposals decided pixel (y, x): see `explain` of label_maps_zs3."""
        return explain(self, y, x, image=image, image_size=image_size)


def final_probabilities(outputs: Zs3Output) -> Tensor:
    """(B, Q, C), the weights of the masks in Eq. 4. outputs: a Zs3Output, or a dict as pipelines make of it."""
    if outputs.get("ensemble_probs") is not None:
        return outputs["ensemble_probs"]
    return own_probabilities(outputs)


def own_probabilities(outputs: Zs3Output) -> Tensor:
    """(B, Q, C), p_q of Eq. 2 times the objectness, if there is one; without an ensemble."""
    probs = class_probabilities(outputs["class_logits"], outputs.get("background_logits"))
    objectness = outputs.get("objectness")
    return probs if objectness is None else probs * objectness[..., None]


def class_probabilities(class_logits: Tensor, background_logits: Tensor | None = None) -> Tensor:
    """p_q of Eq. 2: class_logits (..., Q, C) = cosine / temperature -> (..., Q, C).

    background_logits: (..., Q), of the learned t_0, if there is one. It takes part in the sum (j = 0 of Eq. 2) and its
    column is dropped: rows then sum to at most 1.
    """
    if background_logits is None:
        return at_least_float32(class_logits).softmax(-1)
    logits = torch.cat([class_logits, background_logits[..., None]], dim=-1)
    return at_least_float32(logits).softmax(-1)[..., :-1]


def cosine_similarity(class_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """R of section 3.2: class_embeds (B, Q, D), text_embeds (C, D) -> (B, Q, C), cosine in [-1, 1]."""
    device = "cpu" if class_embeds.is_meta else class_embeds.device.type  # autocast knows no "meta"
    with torch.autocast(device, enabled=False):  # 0.4 % of a cosine is 0.4 of a logit at tau = 0.01
        text_embeds = text_embeds.to(class_embeds.device).float()
        return F.normalize(class_embeds.float(), dim=-1) @ F.normalize(text_embeds, dim=-1).T


def label_similarity(class_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """`cosine_similarity`, but equal text vectors get equal columns, so that the first of them wins.

    A matrix product alone may round equal columns differently. A compiled or exported graph is the product alone.
    """
    return tie(cosine_similarity(class_embeds, text_embeds), F.normalize(text_embeds.float(), dim=-1).T)


def tie(values: Tensor, source: Tensor) -> Tensor:
    """values (..., C), source (..., C): columns with equal sources all become the first of them, to the last bit.

    Products and powers need it: at the end of a row they may be rounded in another way than in its middle.
    """
    if source.shape[-1] < 2 or has_no_values(source):
        return values
    columns = source.reshape(-1, source.shape[-1])
    # On the CPU: not every device has `unique` along an axis. Four rows tell nearly all columns apart.
    _, group, size = columns[:4].cpu().unique(dim=1, return_inverse=True, return_counts=True)
    alike = (size[group] > 1).nonzero()[:, 0]
    if len(alike) == 0:
        return values
    _, group = columns[:, alike.to(columns.device)].cpu().unique(dim=1, return_inverse=True)
    first = torch.full_like(alike, values.shape[-1]).scatter_reduce(0, group, alike, "amin")
    order = torch.arange(values.shape[-1]).index_copy(0, alike, first[group])
    return values[..., order.to(values.device)]


def best_synonyms(logits: Tensor, owner: Tensor) -> Tensor:
    """The largest logit among a class's synonyms: logits (B, Q, S), owner (S,) int64, their classes -> (B, Q, C)."""
    owner = owner.expand_as(logits)
    best = logits.new_empty(*logits.shape[:2], int(owner.max()) + 1)
    return best.scatter_reduce(2, owner, logits, "amax", include_self=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of half precision as float32, others unchanged."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor's values cannot be read: it is "meta", or PyTorch makes a graph or a torch.func transform."""
    made = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return made or tensor.is_meta or isinstance(tensor, FakeTensor)


def check_finite_output(name: str, values: Tensor) -> None:
    """Raises Refused where an output is not finite: a label map made of it would look like an answer."""
    if not has_no_values(values) and not torch.isfinite(values).all():
        raise Refused(f"{name} hold NaN or infinities: look for them in the weights and pixel_values, or use float32")
