"""Mask2Former's forward, in less time and memory: transformers' modules hold the weights, the functions here use them.

The functions read weights and do not call the layers that hold them. So every layer of the network must be plain.
Where one is an adapter, quantised, hooked or offloaded (`is_plain`), transformers' own forward calls all layers.

The outputs are those of transformers' Mask2FormerModel (to 1e-4, tests/test_network.py). Differences:
    backbone: channels last; a ResNet with fixed batch norms runs as convolutions alone (`normed_convolution`).
    pixel decoder: on a CPU deformable attention gathers the neighbours of its sampling points as weighted bags of rows
        (`bags_of_neighbours`). No tensor of sampled values is made, and none is kept for the gradient.
    transformer decoder: fused attention. The masks of attention are computed at the size of the small feature maps.
        Without a loss only the last output's masks are made.

Axes: B image, C channel, Q query, S position of all levels, G head, P sampling points of all levels, D channel of a
head, H W of a level, h w of the masks.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import _has_any_global_hook
from transformers import Mask2FormerModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerMLPPredictionHead,
    Mask2FormerModelOutput,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPredictionBlock,
    Mask2FormerTransformerModule,
    multi_scale_deformable_attention,
)
from transformers.models.resnet.modeling_resnet import ResNetBackbone
from transformers.utils import ModelOutput

try:
    from scipy.sparse import csc_array
except ImportError:  # inference needs no gradients
    csc_array = None

POSITIONS_AT_ONCE = 2**9  # in the deformable encoder, of each thread: their values fit into its core's cache

Size = tuple[int, int]
# run(function, *args) returns function(*args); `torch.utils.checkpoint.checkpoint` is one.
Run = Callable[..., Tensor]


class DecoderOutputs(NamedTuple):
    """The outputs of the queries themselves and of each decoder layer, or of the last layer alone."""

    mask_logits: list[Tensor]  # (B, Q, h, w)
    hidden: list[Tensor]  # (B, Q, C), normalised: the input of the class projection


def run_plainly(function: Callable[..., Tensor], *args: object) -> Tensor:
    return function(*args)


def decoder_outputs(
    network: Mask2FormerModel, pixel_values: Tensor, every: bool, run: Run = run_plainly
) -> DecoderOutputs:
    """`network(pixel_values)`: pixel_values (B, 3, H, W), sides of multiples of 32.

    every: the outputs of all layers, for deep supervision, or of the last one alone.
    run: runs plain layers; `torch.utils.checkpoint.checkpoint` keeps only their inputs for the gradient.
    """
    if not is_plain(network):
        return transformers_outputs(network, pixel_values, every)[0]
    pixels = network.pixel_level_module
    features = backbone_features(pixels.encoder, pixel_values.contiguous(memory_format=torch.channels_last), run)
    mask_features, levels = pixel_decoder(pixels.decoder, features, run)
    return transformer_decoder(network.transformer_module, mask_features, levels, every, run)


def transformers_outputs(
    network: Mask2FormerModel, pixel_values: Tensor, every: bool, attentions: bool = False
) -> tuple[DecoderOutputs, Mask2FormerModelOutput]:
    """The same by transformers' own forward; and all that it returns, with hidden states."""
    outputs = network(pixel_values, output_hidden_states=True, output_attentions=attentions, return_dict=True)
    mask_logits = list(outputs.masks_queries_logits)
    hidden = [state.transpose(0, 1) for state in outputs.transformer_decoder_intermediate_states]
    return DecoderOutputs(mask_logits, hidden) if every else DecoderOutputs(mask_logits[-1:], hidden[-1:]), outputs


# ------------------------------------------------------------------------------------------- is it all plain?

PLAIN_SOURCES = ("torch.nn.modules.", "transformers.models.", "transformers.activations", __name__)
PLAIN_WEIGHTS = {nn.Parameter, Tensor, FakeTensor, type(None)}  # FakeTensor: under torch.export
# Children by name, and their only kind: their weights are read, or their output is changed in place.
TAKEN_APART = {
    "convolution": nn.Conv2d,
    "normalization": nn.modules.batchnorm._BatchNorm,
    "sampling_offsets": nn.Linear,
    "fc1": nn.Linear,
    "cross_attn": nn.MultiheadAttention,
    "queries_embedder": nn.Embedding,
    "queries_features": nn.Embedding,
    "level_embed": nn.Embedding,
}


def is_plain(network: Mask2FormerModel) -> bool:
    """Whether the functions here may be used: the network's layers are PyTorch's and transformers' own, nothing
    watches their calls (hooks, a `forward` set on one, a compiled one), and their weights are plain tensors.

    A backbone that is no ResNet is called as a whole, and may be of any kind. Nothing is plain under torch.func and
    torch.jit.trace, which do not know `bags_of_neighbours`.
    """
    if _has_any_global_hook() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    layers: list[nn.Module] = [network]
    for layer in layers:  # grows
        if not is_plain_layer(layer):
            return False
        layers += [child for child in layer._modules.values() if child is not None and not is_foreign(child)]
    return True


def is_foreign(layer: nn.Module) -> bool:
    """Whether it is a backbone that is called as a whole."""
    return isinstance(layer, PreTrainedModel) and not isinstance(layer, ResNetBackbone)


def is_plain_layer(layer: nn.Module) -> bool:
    """Without its children, but for their kinds."""
    own, kind = layer.__dict__, type(layer)
    return (
        kind.__module__.startswith(PLAIN_SOURCES)
        and kind.forward.__module__.startswith(PLAIN_SOURCES)
        and ("forward" not in own or getattr(own["forward"], "__func__", None) is kind.forward)
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
        and not (own["_backward_pre_hooks"] or layer._compiled_call_impl)
        and PLAIN_WEIGHTS.issuperset(map(type, own["_parameters"].values()))
        and all(isinstance(child, TAKEN_APART.get(name, nn.Module)) for name, child in own["_modules"].items())
    )


# ------------------------------------------------------------------------------------------------- backbone


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def backbone_features(backbone: nn.Module, pixel_values: Tensor, run: Run) -> Sequence[Tensor]:
    """Feature maps of strides 4, 8, 16 and 32."""
    if not isinstance(backbone, ResNetBackbone) or any(norm.training for norm in batch_norms(backbone)):
        return backbone(pixel_values).feature_maps
    hidden = backbone.embedder.pooler(convolution_layer(backbone.embedder.embedder, pixel_values))
    features = {"stem": hidden}
    for name, stage in zip(backbone.stage_names[1:], backbone.encoder.stages, strict=True):
        for layer in stage.layers:
            hidden = run(residual_layer, layer, hidden)
        features[name] = hidden
    return [features[name] for name in backbone.out_features]


def residual_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A ResNet's basic or bottleneck layer."""
    shortcut = hidden if isinstance(layer.shortcut, nn.Identity) else normed_convolution(layer.shortcut, hidden)
    for convolution in layer.layer:
        hidden = convolution_layer(convolution, hidden)
    return activate(layer.activation, hidden.add_(shortcut))


def convolution_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    return activate(layer.activation, normed_convolution(layer, hidden))


def normed_convolution(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Convolution and fixed batch norm as one convolution: no value between them is kept for a gradient."""
    convolution, norm = layer.convolution, layer.normalization
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = convolution.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(hidden, weight, bias, convolution.stride, convolution.padding)


def activate(activation: nn.Module, hidden: Tensor) -> Tensor:
    """In place where it is possible: `hidden` is not used afterwards."""
    return hidden.relu_() if isinstance(activation, nn.ReLU) else activation(hidden)


# -------------------------------------------------------------------------------------------- pixel decoder


def pixel_decoder(decoder: nn.Module, features: Sequence[Tensor], run: Run) -> tuple[Tensor, list[Tensor]]:
    """The mask features (B, C, h, w) and the three levels (B, C, H, W), from the coarsest on."""
    sources = list(features[::-1][: decoder.num_feature_levels])
    projected = [project(source) for project, source in zip(decoder.input_projections, sources, strict=True)]
    sizes = [tuple(level.shape[2:]) for level in projected]
    hidden = torch.cat([tokens(level) for level in projected], dim=1)  # (B, S, C)
    positions = [
        sine_positions(size, hidden.shape[2], hidden) + embed
        for size, embed in zip(sizes, decoder.level_embed, strict=True)
    ]
    positions = torch.cat(positions)  # (S, C)
    anchors = sampling_anchors(sizes, decoder.encoder.layers[0].self_attn, hidden)
    for layer in decoder.encoder.layers:
        hidden = run(encoder_layer, layer, hidden, positions, anchors, sizes)
    parts = hidden.split([height * width for height, width in sizes], dim=1)
    levels = [part.unflatten(1, size).permute(0, 3, 1, 2) for part, size in zip(parts, sizes, strict=True)]

    finest = levels[-1]
    finer = features[: decoder.num_fpn_levels][::-1]
    for lateral, output, feature in zip(decoder.lateral_convolutions, decoder.output_convolutions, finer, strict=True):
        lateral = lateral(feature)
        coarse = F.interpolate(finest, size=lateral.shape[2:], mode="bilinear", align_corners=False)
        finest = output(coarse.add_(lateral))
    return decoder.mask_projection(finest), levels


def tokens(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C), a view where channels are last."""
    return feature_map.flatten(2).transpose(1, 2)


def sine_positions(size: Size, channels: int, like: Tensor) -> Tensor:
    """(HW, channels): sines and cosines of the row, then those of the column (Carion et al. 2020), normalised."""
    frequency = torch.arange(channels // 2, dtype=torch.int64, device=like.device).to(like.dtype)
    frequency = 10000 ** (2 * frequency.div(2, rounding_mode="floor") / (channels // 2))
    waves = []
    for side in size:
        place = torch.arange(1, side + 1, dtype=like.dtype, device=like.device)
        phase = (place / (place[-1] + 1e-6) * (2 * torch.pi))[:, None] / frequency
        waves.append(torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1))
    rows, columns = waves
    height, width = size
    return torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2).flatten(0, 1)


def sampling_anchors(sizes: Sequence[Size], attention: nn.Module, like: Tensor) -> Tensor:
    """(2, S, G * P): the column and the row of each position in the level of each sampling point, in that level's
    pixels (0: the first)."""
    kind = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    columns, rows = [], []
    for height, width in sizes:
        row = (torch.arange(height, **kind) + 0.5) / height
        column = (torch.arange(width, **kind) + 0.5) / width
        rows.append(row[:, None].expand(height, width).flatten())
        columns.append(column.expand(height, width).flatten())
    column, row = torch.cat(columns), torch.cat(rows)
    anchors = torch.stack(
        [
            torch.stack([column * width - 0.5 for _, width in sizes], dim=1),
            torch.stack([row * height - 0.5 for height, _ in sizes], dim=1),
        ]
    )
    return anchors[:, :, None, :, None].expand(-1, -1, attention.n_heads, -1, attention.n_points).flatten(2)


def encoder_layer(layer: nn.Module, hidden: Tensor, positions: Tensor, anchors: Tensor, sizes: list[Size]) -> Tensor:
    """(B, S, C) -> (B, S, C)."""
    hidden = hidden + dropout(layer, deformable_attention(layer.self_attn, hidden, positions, anchors, sizes))
    hidden = layer.self_attn_layer_norm(hidden)
    hidden = hidden + two_linear_layers(layer, hidden)
    return layer.final_layer_norm(hidden)


def positions_at_once() -> int:
    return POSITIONS_AT_ONCE * torch.get_num_threads()


def two_linear_layers(layer: nn.Module, hidden: Tensor) -> Tensor:
    """(B, S, C) -> (B, S, C). On a CPU they take some positions at a time."""

    def linear(part: Tensor) -> Tensor:
        return dropout(layer, layer.fc2(dropout(layer, layer.fc1(part).relu_())))

    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return linear(hidden)
    return torch.cat([linear(part) for part in hidden.flatten(0, 1).split(positions_at_once())]).view_as(hidden)


def deformable_attention(
    attention: nn.Module, hidden: Tensor, positions: Tensor, anchors: Tensor, sizes: list[Size]
) -> Tensor:
    """Multi-scale deformable self-attention (Zhu et al. 2021): (B, S, C) -> (B, S, C)."""
    heads, points = attention.n_heads, attention.n_levels * attention.n_points
    value = attention.value_proj(hidden).unflatten(2, (heads, -1))
    query = hidden + positions
    weight = softmax_of_few(attention.attention_weights(query).unflatten(2, (heads, points)))
    # The rows of the layer's weight are for columns and for rows by turns.
    offsets = attention.sampling_offsets
    steps = zip(
        offsets.weight.unflatten(0, (-1, 2)).unbind(1), offsets.bias.unflatten(0, (-1, 2)).unbind(1), strict=True
    )
    column, row = (
        (F.linear(query, *step) + anchor).unflatten(2, (heads, points))
        for step, anchor in zip(steps, anchors, strict=True)
    )
    return attention.output_proj(deformable_sum(value, column, row, weight, sizes))


def softmax_of_few(logits: Tensor) -> Tensor:
    """logits.softmax(-1) of (B, S, G, P), faster on a CPU: P is small, and its values lie side by side in memory."""
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    return logits.permute(0, 2, 3, 1).softmax(2).permute(0, 3, 1, 2).contiguous()


def deformable_sum(value: Tensor, column: Tensor, row: Tensor, weight: Tensor, sizes: list[Size]) -> Tensor:
    """The weighted sum of bilinear samples of all levels -> (B, S, G * D). Levels are zero beyond their borders.

    value: (B, S, G, D). weight: (B, S, G, P), of the samples. column, row: (B, S, G, P), the sampling points in pixels
    of their level. Every level has the same number of points, level after level; the last is at least 2 x 2 pixels.
    Computed in float32, also in a model of lower precision.
    """
    kind, precise = value.dtype, torch.promote_types(value.dtype, torch.float32)
    value, column, row, weight = (tensor.to(precise) for tensor in (value, column, row, weight))
    on_cpu = value.device.type == "cpu"
    return (bags_of_neighbours if on_cpu else grid_samples)(value, column, row, weight, sizes).to(kind)


def grid_samples(value: Tensor, column: Tensor, row: Tensor, weight: Tensor, sizes: list[Size]) -> Tensor:
    """`deformable_sum` by transformers' function, on devices other than a CPU."""
    levels = len(sizes)
    columns = [(of + 0.5) / width for of, (_, width) in zip(column.chunk(levels, dim=3), sizes, strict=True)]
    rows = [(of + 0.5) / height for of, (height, _) in zip(row.chunk(levels, dim=3), sizes, strict=True)]
    places = torch.stack([torch.stack(columns, dim=3), torch.stack(rows, dim=3)], dim=5)
    return multi_scale_deformable_attention(value, sizes, places, weight.unflatten(3, (levels, -1)))


def bags_of_neighbours(value: Tensor, column: Tensor, row: Tensor, weight: Tensor, sizes: list[Size]) -> Tensor:
    """`deformable_sum` on a CPU.

    A sample is a weighted sum of four neighbours, which are among the S * G rows (D,) of `value`. So all sums together
    are a sparse matrix times these rows. PyTorch multiplies by it as an `embedding_bag`, scipy by its transpose. Each
    direction is an operator of its own, which torch.compile does not look into.
    """
    return _bags(value, column, row, weight, *zip(*sizes, strict=True))


# Remote code makes copies of this module, and each copy has its own operators. Their names allow fewer characters than
# a module's name: hence the hash.
_OPERATORS = "zs3_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]


@torch.library.custom_op(f"{_OPERATORS}::bags", mutates_args=())
def _bags(
    value: Tensor, column: Tensor, row: Tensor, weight: Tensor, heights: Sequence[int], widths: Sequence[int]
) -> Tensor:
    grid, positions = _grid(heights, widths, column), value.shape[1]
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    for images in _few_images(value):
        rows = value[images].flatten(0, 2)
        for first in range(0, positions, positions_at_once()):
            some = images, slice(first, first + positions_at_once())
            points = _neighbours(column[some], row[some], grid, positions)
            shares = _shares(points, weight[some].flatten(2))
            sums = [
                F.embedding_bag(index, rows[start:], per_sample_weights=share.view_as(index), mode="sum")
                for (index, start), share in zip(points.rows, shares, strict=True)
            ]
            output[some] = sums[0].add_(sums[1]).add_(sums[2]).add_(sums[3]).view_as(output[some])
    return output.flatten(2)


@torch.library.custom_op(f"{_OPERATORS}::bags_backward", mutates_args=())
def _bags_backward(
    grad: Tensor,
    value: Tensor,
    column: Tensor,
    row: Tensor,
    weight: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if csc_array is None:
        raise ImportError("training on a CPU needs scipy: pip install scipy")
    grid = _grid(heights, widths, column)
    of_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    of_points = [torch.empty_like(column, memory_format=torch.contiguous_format) for _ in range(3)]
    for images in _few_images(value):
        rows, of_sums = value[images].flatten(0, 2), grad[images].reshape(-1, value.shape[3])
        points, weights = _neighbours(column[images], row[images], grid, value.shape[1]), weight[images].flatten(2)
        of_rows, of_shares = of_value[images].flatten(0, 2), []
        for (index, start), share in zip(points.rows, _shares(points, weights), strict=True):
            of_rows[start:] += _transposed_sum(index, share, of_sums, len(rows) - start)
            of_shares.append(_dot_products(index, of_sums, rows[start:]).view_as(share))
        for whole, part in zip(of_points, _shares_backward(points, weights, of_shares), strict=True):
            whole[images] = part.view_as(whole[images])
    return of_value, *of_points


@_bags.register_fake
def _(value: Tensor, *_: object) -> Tensor:
    return value.new_empty(*value.shape[:2], value.shape[2] * value.shape[3])


@_bags_backward.register_fake
def _(_: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:4])


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.heights, ctx.widths = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_bags_backward(grad, *ctx.saved_tensors, ctx.heights, ctx.widths), None, None


_bags.register_autograd(_gradients, setup_context=_keep)


class _Grid(NamedTuple):
    """The level of each sampling point: tensors (G * P,)."""

    last_column: Tensor  # the last that can be the left one of a point's two columns
    last_row: Tensor
    to_right: Tensor  # 1, or infinity where there is no second column
    to_lower: Tensor
    width: Tensor  # in rows of `value`, int32
    first: Tensor  # row of `value` of the level's first pixel and the point's head, int32


class _Neighbours(NamedTuple):
    """The four neighbours of each sampling point, and its distances from them, for some images."""

    rows: list[tuple[Tensor, int]]  # int32 (B * S * G, P), and what to add: upper left and right, lower left and right
    left: Tensor  # (B, S, G * P), the point's distance from the left column; the next three likewise
    right: Tensor
    upper: Tensor
    lower: Tensor


def _few_images(value: Tensor) -> list[slice]:
    """Images that share a call: one small image alone would be too little work for it."""
    images, positions = value.shape[:2]
    count = max(1, positions_at_once() // positions)
    return [slice(first, first + count) for first in range(0, images, count)]


def _grid(heights: Sequence[int], widths: Sequence[int], column: Tensor) -> _Grid:
    heads, points = column.shape[2:]

    def spread(of_levels: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(of_levels, dtype=dtype).repeat_interleave(points // len(heights)).repeat(heads)

    pixels = [height * width for height, width in zip(heights, widths, strict=True)]
    first = spread([heads * sum(pixels[:level]) for level in range(len(pixels))], torch.int32)
    return _Grid(
        last_column=spread([max(width - 2, 0) for width in widths], column.dtype),
        last_row=spread([max(height - 2, 0) for height in heights], column.dtype),
        to_right=spread([1 if width > 1 else torch.inf for width in widths], column.dtype),
        to_lower=spread([1 if height > 1 else torch.inf for height in heights], column.dtype),
        width=spread([heads * width for width in widths], torch.int32),
        first=first + torch.arange(heads, dtype=torch.int32).repeat_interleave(points),
    )


def _neighbours(column: Tensor, row: Tensor, grid: _Grid, positions: int) -> _Neighbours:
    """column, row: (B, S, G, P), for some positions of images that have `positions`. Near a border these are the two
    nearest columns or rows; the point may be farther from them than a pixel. A NaN becomes an index, too."""
    images, _, heads, points = column.shape
    column, row, zero = column.flatten(2), row.flatten(2), column.new_zeros(())
    left = column.floor().nan_to_num_(0).clamp_(zero, grid.last_column)
    upper = row.floor().nan_to_num_(0).clamp_(zero, grid.last_row)
    above = upper.int().mul_(grid.width).add_(left.int(), alpha=heads).add_(grid.first)
    above += torch.arange(images, dtype=torch.int32)[:, None, None] * (positions * heads)
    below = above + grid.width
    above, below = above.view(-1, points), below.view(-1, points)
    across, down = column - left, row - upper
    return _Neighbours(
        rows=[(above, 0), (above, heads), (below, 0), (below, heads)],
        left=across,
        right=across - grid.to_right,
        upper=down,
        lower=down - grid.to_lower,
    )


def _share(distance: Tensor) -> Tensor:
    """The share of a row or column in a sample at this distance: 1 at 0, 0 from one pixel on."""
    return distance.abs().neg_().add_(1).relu_()


def _slope(distance: Tensor) -> Tensor:
    """The derivative of `_share`; where it has two, the one towards larger distances."""
    pixel = distance.floor()
    return (pixel == -1).to(distance.dtype) - (pixel == 0).to(distance.dtype)


def _shares(points: _Neighbours, weight: Tensor) -> list[Tensor]:
    """The shares of the four neighbours, in the order of `rows`; weight: (B, S, G * P)."""
    left, right = _share(points.left), _share(points.right)
    upper, lower = _share(points.upper).mul_(weight), _share(points.lower).mul_(weight)
    return [upper * left, upper * right, lower * left, lower * right]


def _shares_backward(points: _Neighbours, weight: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of column, row and weight, from those of `_shares`."""
    left, right = _share(points.left), _share(points.right)
    upper, lower = _share(points.upper), _share(points.lower)
    of_upper, of_lower = grads[0] * left + grads[1] * right, grads[2] * left + grads[3] * right
    of_left, of_right = grads[0] * upper + grads[2] * lower, grads[1] * upper + grads[3] * lower
    return (
        weight * (of_left * _slope(points.left) + of_right * _slope(points.right)),
        weight * (of_upper * _slope(points.upper) + of_lower * _slope(points.lower)),
        of_upper * upper + of_lower * lower,
    )


def _transposed_sum(index: Tensor, share: Tensor, of_sums: Tensor, num_rows: int) -> Tensor:
    """The gradient of a bag's rows: index (N, P), share (N * P elements), of_sums (N, D) -> (num_rows, D)."""
    starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
    arrays = (array.flatten().numpy() for array in (share, index, starts))
    return torch.from_numpy(csc_array(tuple(arrays), shape=(num_rows, len(index))) @ of_sums.numpy())


def _dot_products(index: Tensor, of_sums: Tensor, rows: Tensor) -> Tensor:
    """The gradient of a bag's weights: index (N, P), of_sums (N, D), rows (R, D) -> (N * P,)."""
    starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
    nothing = torch.zeros(index.numel(), dtype=rows.dtype)
    size = (len(index), len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse CSR tensors are "in beta state"
        places = torch.sparse_csr_tensor(starts, index.flatten(), nothing, size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(places, of_sums, rows.T, beta=0.0).values()


# -------------------------------------------------------------------------------------- transformer decoder


def transformer_decoder(
    module: nn.Module, mask_features: Tensor, levels: list[Tensor], every: bool, run: Run
) -> DecoderOutputs:
    """Queries look at one level after the other, each inside its last mask (Cheng et al. 2022)."""
    decoder, batch = module.decoder, len(mask_features)
    predictor, sizes = decoder.mask_predictor, [tuple(level.shape[2:]) for level in levels]
    sources = [
        tokens(project(level)) + embed
        for project, level, embed in zip(module.input_projections, levels, module.level_embed.weight, strict=True)
    ]
    positions = [sine_positions(size, source.shape[2], source) for size, source in zip(sizes, sources, strict=True)]
    # Masks are linear in the mask features: to resize these first gives the same.
    with torch.no_grad():
        small = [F.interpolate(mask_features, size=size, mode="bilinear", align_corners=False) for size in sizes]
    query_positions = module.queries_embedder.weight
    hidden = module.queries_features.weight.repeat(batch, 1, 1)

    outputs = DecoderOutputs([], [])
    for index in range(len(decoder.layers) + 1):
        normed = decoder.layernorm(hidden)
        last = index == len(decoder.layers)
        mask_embeds = predictor.mask_embedder(normed)  # (B, Q, C)
        if every or last:
            outputs.mask_logits.append((mask_embeds @ mask_features.flatten(2)).unflatten(2, mask_features.shape[2:]))
            outputs.hidden.append(normed)
        if not last:
            level = index % len(levels)
            visible = visible_tokens(mask_embeds.detach(), small[level])
            layer = decoder.layers[index]
            hidden = run(decoder_layer, layer, hidden, query_positions, sources[level], positions[level], visible)
    return outputs


@torch.no_grad()
def visible_tokens(mask_embeds: Tensor, features: Tensor) -> Tensor:
    """True inside a query's mask, or everywhere if it is empty: (B, Q, C), (B, C, H, W) -> (B, 1, Q, HW) bool."""
    inside = (mask_embeds @ features.flatten(2)).sigmoid() >= 0.5
    return (inside | ~inside.any(dim=2, keepdim=True))[:, None]


def decoder_layer(
    layer: nn.Module, hidden: Tensor, query_positions: Tensor, source: Tensor, positions: Tensor, visible: Tensor
) -> Tensor:
    """Masked cross-attention, self-attention, two linear layers, each plus its input: (B, Q, C) -> (B, Q, C)."""

    def cross(hidden: Tensor) -> Tensor:
        attention = layer.cross_attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        inputs = (hidden + query_positions, source + positions, source)
        projected = (F.linear(*three) for three in zip(inputs, weights, biases, strict=True))
        return attention.out_proj(attend(layer, *projected, attention.num_heads, visible))

    def itself(hidden: Tensor) -> Tensor:
        attention, placed = layer.self_attn, hidden + query_positions
        projected = (attention.q_proj(placed), attention.k_proj(placed), attention.v_proj(hidden))
        return attention.out_proj(attend(layer, *projected, attention.num_heads))

    def linear(hidden: Tensor) -> Tensor:
        return layer.fc2(dropout(layer, layer.activation_fn(layer.fc1(hidden))))

    norms = (layer.cross_attn_layer_norm, layer.self_attn_layer_norm, layer.final_layer_norm)
    for block, norm in zip((cross, itself, linear), norms, strict=True):
        if layer.pre_norm:
            hidden = hidden + dropout(layer, block(norm(hidden)))
        else:
            hidden = norm(hidden + dropout(layer, block(hidden)))
    return hidden


def attend(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None
) -> Tensor:
    """Multi-head attention: query (B, Q, C), key and value (B, K, C), visible (B, 1, Q, K) bool -> (B, Q, C)."""
    query, key, value = (tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    probability = layer.dropout if layer.training else 0.0
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=probability)
    return found.transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------------- called layers


class CrossAttention(nn.MultiheadAttention):
    """Calls `out_proj` as a layer; PyTorch's class reads only its weight."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query (Q, B, C), key and value (K, B, C), masks as PyTorch's -> (Q, B, C), weights (B, Q, K)."""
        attended, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=self.dropout,
            out_proj_weight=torch.eye(self.embed_dim, dtype=query.dtype, device=query.device),
            out_proj_bias=None,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
        )
        return self.out_proj(attended), weights


class MaskBlock(Mask2FormerPredictionBlock):
    """Uses the registered layers. transformers keeps a second list, which still holds layers that were replaced."""

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.children())


class MaskMLP(Mask2FormerMLPPredictionHead):
    """As `MaskBlock`."""

    layers = MaskBlock.layers


class PixelDecoder(Mask2FormerPixelDecoder):
    """As `MaskBlock`."""

    @property
    def lateral_convolutions(self) -> list[nn.Module]:
        return [getattr(self, f"adapter_{level}") for level in range(self.num_fpn_levels, 0, -1)]

    @property
    def output_convolutions(self) -> list[nn.Module]:
        return [getattr(self, f"layer_{level}") for level in range(self.num_fpn_levels, 0, -1)]


class TransformerModule(Mask2FormerTransformerModule):
    """Calls the embeddings as layers; transformers' class reads only their weights."""

    def forward(self, multi_scale_features: list[Tensor], *args: object, **kwargs: object) -> ModelOutput:
        device, queries = multi_scale_features[0].device, self.decoder.config.num_queries
        rows = {"queries_embedder": queries, "queries_features": queries, "level_embed": self.num_feature_levels}
        embeddings = {
            name: SimpleNamespace(weight=getattr(self, name)(torch.arange(count, device=device)))
            for name, count in rows.items()
        }
        part = SimpleNamespace(**{**vars(self), **dict(self.named_children()), **embeddings})
        return Mask2FormerTransformerModule.forward(part, multi_scale_features, *args, **kwargs)


class PixelDecoderLayer(GradientCheckpointingLayer, Mask2FormerPixelDecoderEncoderLayer):
    """With gradient checkpointing, as the transformer decoder's layers."""


class TransformerDecoderLayer(Mask2FormerMaskedAttentionDecoderLayer):
    """Takes tensors where transformers' class takes lists: reentrant checkpointing gives gradients to tensors alone."""

    def __call__(
        self, hidden: Tensor, level: int, mask: None, positions: list[Tensor], queries: Tensor, sources: list, **options
    ) -> tuple[Tensor, ...]:
        if self.gradient_checkpointing and self.training:
            level, positions, sources = 0, positions[level][None], sources[level][None]
        return super().__call__(hidden, level, mask, positions, queries, sources, **options)


CALLED = {
    nn.MultiheadAttention: CrossAttention,
    Mask2FormerPredictionBlock: MaskBlock,
    Mask2FormerMLPPredictionHead: MaskMLP,
    Mask2FormerPixelDecoder: PixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer: PixelDecoderLayer,
    Mask2FormerMaskedAttentionDecoderLayer: TransformerDecoderLayer,
    Mask2FormerTransformerModule: TransformerModule,
}


def call_every_layer(network: Mask2FormerModel) -> None:
    """From now on transformers' own forward calls every layer, and computes the same as before.

    So an adapter, a hook or an offloaded weight works in any place. transformers' decoder drops layers at random in
    training with dropout; this is off, so that hooks do not change the network.
    """
    for part in (network.pixel_level_module.decoder, network.transformer_module):
        for layer in part.modules():
            layer.__class__ = CALLED.get(type(layer), type(layer))
            for kept in ("layers", "lateral_convolutions", "output_convolutions"):
                vars(layer).pop(kept, None)
    network.transformer_module.decoder.layerdrop = 0.0


# -------------------------------------------------------------------------------------------------- of both


def dropout(layer: nn.Module, hidden: Tensor) -> Tensor:
    return F.dropout(hidden, layer.dropout) if layer.training and layer.dropout else hidden
