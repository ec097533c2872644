"""network_zs3 beside transformers' own forward of the same modules, and beside loops."""

import copy
import math
import pickle
import re

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, ResNetConfig, SwinConfig

import network_zs3
from network_zs3 import (
    DecoderOutputs,
    _bags,
    bags_of_neighbours,
    call_every_layer,
    decoder_outputs,
    deformable_sum,
    grid_samples,
    is_plain,
    run_plainly,
    visible_tokens,
)

SIZES = {"hidden_dim": 64, "feature_size": 64, "mask_feature_size": 16, "num_queries": 7, "num_attention_heads": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 4, "dim_feedforward": 24, "encoder_feedforward_dim": 24}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 2, 1, 1], "out_features": STAGES}
BACKBONES = {
    "basic": ResNetConfig(layer_type="basic", **RESNET),
    "bottleneck": ResNetConfig(layer_type="bottleneck", downsample_in_first_stage=True, hidden_act="gelu", **RESNET),
    "some": ResNetConfig(layer_type="bottleneck", **RESNET),
    "swin": SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0, out_features=STAGES
    ),
}


def network(backbone: str = "basic", **fields) -> Mask2FormerModel:
    """Random, nothing in it at a value that would hide an error: statistics, offsets, shares of points."""
    torch.manual_seed(0)
    model = Mask2FormerModel(Mask2FormerConfig(backbone_config=BACKBONES[backbone], **{**SIZES, **LAYERS, **fields}))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "sampling_offsets" in name or "attention_weights" in name:
                tensor.normal_(0, 0.5)
            elif "running_var" in name or (tensor.dim() == 1 and "norm" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.2)
    return model.eval()


def theirs(model: Mask2FormerModel, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    outputs = model(pixels, output_hidden_states=True)
    hidden = [state.transpose(0, 1) for state in outputs.transformer_decoder_intermediate_states]
    return list(outputs.masks_queries_logits), hidden


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (32, 32), (32, 160)])
def test_every_output_is_that_of_transformers(backbone, size):
    model, pixels = network(backbone), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(model, pixels)
        every = decoder_outputs(model, pixels, every=True)
        last = decoder_outputs(model, pixels, every=False)
    for found, known in zip(every, expected, strict=True):
        assert len(found) == LAYERS["decoder_layers"]
        for mine, its in zip(found, known, strict=True):
            assert_close(mine, its)
    assert torch.equal(last.mask_logits[0], every.mask_logits[-1]) and len(last.mask_logits) == 1
    assert torch.equal(last.hidden[0], every.hidden[-1]) and len(last.hidden) == 1


@pytest.mark.parametrize("at_once", [1, 50])
def test_some_positions_at_a_time_give_the_same(monkeypatch, at_once):
    model, pixels = network().double(), torch.randn(2, 3, 64, 96).double()  # 126 positions an image

    def outputs_and_gradients() -> list[Tensor]:
        outputs = decoder_outputs(model, pixels, every=False)
        total = outputs.mask_logits[0].square().mean() + outputs.hidden[0].square().mean()
        used = [weight for name, weight in model.named_parameters() if "pixel_level_module.decoder.encoder" in name]
        return [outputs.mask_logits[0], outputs.hidden[0], *torch.autograd.grad(total, used)]

    expected = outputs_and_gradients()
    monkeypatch.setattr(network_zs3, "POSITIONS_AT_ONCE", at_once)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for found, known in zip(outputs_and_gradients(), expected, strict=True):
        assert torch.allclose(found, known, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norms_learn", [False, True])
@pytest.mark.parametrize("backbone", ["some", "swin"])
def test_every_gradient_is_that_of_transformers(backbone, norms_learn):
    # In float64, where rounding moves no pixel into a mask or out of it.
    model, pixels = network(backbone).double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    if norms_learn:
        model.train()
    other = copy.deepcopy(model)
    weights = [torch.randn(2, 7, 16, 24).double(), torch.randn(2, 7, 64).double()]
    for outputs in (theirs(other, pixels), decoder_outputs(model, pixels, every=True)):
        sum(
            (value * weight).sum() for values, weight in zip(outputs, weights, strict=True) for value in values
        ).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in other.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            # Some are nothing but rounding: a softmax does not see its keys' bias.
            assert (gradients[name] - parameter.grad).abs().max() < 1e-6 * parameter.grad.abs().max() + 1e-9, name
    for (name, mine), its in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine, its), name


def test_norms_before_the_blocks_are_those_of_transformers():
    model, pixels = network(pre_norm=True), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, known in zip(decoder_outputs(model, pixels, every=True), theirs(model, pixels), strict=True):
            assert_close(found[-1], known[-1])


def test_dropout_is_of_training_alone_and_as_often_as_in_transformers(monkeypatch):
    model, pixels = network(dropout=0.5), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(decoder_outputs(model, pixels, every=False).hidden[0], theirs(model, pixels)[1][-1])
    dropped, dropout, attention = [], nn.functional.dropout, nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, *a, **k: dropped.append(p) or dropout(x, p, *a, **k))
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, dropout_p, **k: dropped.append(dropout_p) or attention(*a, dropout_p=dropout_p, **k),
    )
    decoder_outputs(model.train(), pixels, every=False)
    # pixel decoder: attention, two linear layers; decoder: the same and self-attention, and the attentions' own
    assert dropped == [0.5] * (3 * LAYERS["encoder_layers"] + 6 * (LAYERS["decoder_layers"] - 1))


def points(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """value, column, row and weight, two images, three heads, two points a level, many beyond the borders."""
    torch.manual_seed(1)
    positions = sum(height * width for height, width in sizes)
    shape = (2, positions, 3, 2 * len(sizes))
    places = (torch.rand(shape, dtype=dtype) * (side + 6) - 3 for side in (sizes[-1][1], sizes[-1][0]))
    tensors = [torch.randn(2, positions, 3, 4, dtype=dtype), *places, torch.rand(shape, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("sum_of_samples", [bags_of_neighbours, grid_samples])
@pytest.mark.parametrize("sizes", [[(2, 3), (4, 6)], [(1, 1), (2, 2), (4, 4)], [(1, 4), (2, 8)], [(3, 1), (6, 2)]])
def test_a_deformable_sum_is_a_loop_over_neighbours(sizes, sum_of_samples):
    value, column, row, weight = (tensor.detach().float() for tensor in points(sizes))
    expected = torch.zeros_like(value)
    for image, position, head, point in torch.cartesian_prod(*(torch.arange(side) for side in weight.shape)).tolist():
        level = point // 2
        height, width = sizes[level]
        first = sum(h * w for h, w in sizes[:level])
        at = (image, position, head, point)
        for y in (math.floor(row[at]), math.floor(row[at]) + 1):
            for x in (math.floor(column[at]), math.floor(column[at]) + 1):
                if 0 <= y < height and 0 <= x < width:
                    share = (1 - abs(float(row[at]) - y)) * (1 - abs(float(column[at]) - x)) * float(weight[at])
                    expected[image, position, head] += share * value[image, first + y * width + x, head]
    assert torch.allclose(sum_of_samples(value, column, row, weight, sizes), expected.flatten(2), atol=1e-5)


@pytest.mark.parametrize("sizes", [[(2, 3), (4, 6)], [(1, 1), (2, 2)]])
def test_gradients_of_the_deformable_sum_are_those_of_grid_sample(sizes):
    value, column, row, weight = points(sizes)
    expected = grid_samples(value, column, row, weight, sizes)
    found = bags_of_neighbours(value, column, row, weight, sizes)
    assert torch.allclose(found, expected, atol=1e-12)
    outward = torch.randn_like(found)
    for mine, its in zip(
        torch.autograd.grad(found, (value, column, row, weight), outward),
        torch.autograd.grad(expected, (value, column, row, weight), outward),
        strict=True,
    ):
        assert torch.allclose(mine, its, atol=1e-11)


def test_the_operators_are_what_torch_compile_takes_them_for():
    value, column, row, weight = points([(2, 3), (4, 6)])
    torch.library.opcheck(_bags, (value, column, row, weight, (2, 4), (3, 6)))


def test_half_precision_is_summed_in_float32():
    value, column, row, weight = (tensor.detach().float() for tensor in points([(2, 3), (4, 6)]))
    found = deformable_sum(value.bfloat16(), column, row, weight, [(2, 3), (4, 6)])
    assert found.dtype == torch.bfloat16
    expected = deformable_sum(value.bfloat16().float(), column, row, weight, [(2, 3), (4, 6)])
    assert torch.equal(found, expected.bfloat16())


def test_on_a_pixel_the_gradient_looks_right_and_down_as_grid_sample_does():
    value, _, _, weight = (tensor.detach().float() for tensor in points([(4, 4)]))
    weight = weight.requires_grad_()
    column, row = (torch.randint(-1, 5, weight.shape).float().requires_grad_() for _ in range(2))
    # 4 divides exactly, so both see whole pixels
    expected = grid_samples(value, column, row, weight, [(4, 4)])
    found = bags_of_neighbours(value, column, row, weight, [(4, 4)])
    for mine, its in zip(
        torch.autograd.grad(found.sum(), (column, row)), torch.autograd.grad(expected.sum(), (column, row)), strict=True
    ):
        assert torch.allclose(mine, its, atol=1e-5)


def test_a_network_that_went_astray_gives_nan_and_no_foreign_memory():
    value, column, row, weight = (tensor.detach().float() for tensor in points([(2, 2), (4, 4)]))
    column[0, 0, 0, 0], row[0, 1, 0, 0], row[1, 0, 0, 1] = math.nan, math.inf, -math.inf
    found = deformable_sum(value, column, row, weight, [(2, 2), (4, 4)])
    assert found[0, 0, :4].isnan().all() and found[0, 2:].isfinite().all()


def test_a_query_whose_mask_is_nowhere_sees_everything():
    features = torch.rand(1, 4, 2, 3)  # where -1 -1 -1 -1 is nowhere
    embeds = torch.tensor([[[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]])
    visible = visible_tokens(embeds, features)
    inside = [float((embeds[0, 0] * features[0, :, y, x]).sum()) >= 0 for y in range(2) for x in range(3)]
    assert visible.shape == (1, 1, 3, 6) and 0 < sum(inside) < 6
    assert visible[0, 0].tolist() == [inside, [True] * 6, [True] * 6]


def train_step(model, **batch) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_with_activations_made_anew_are_the_same_and_fewer_are_kept():
    model = tiny_model(text=False)
    model.freeze_backbone_norms()
    model.train()
    batch = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "labels": torch.arange(64).expand(2, 64, 64) // 16,
        "text_embeds": torch.randn(5, 12),
    }
    kept = {}

    def step(name: str) -> dict[str, Tensor]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            gradients = train_step(model, **batch)
        kept[name] = len(saved)
        return gradients

    plain = step("plain")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    anew = step("anew")
    assert plain.keys() == anew.keys()
    assert all(torch.allclose(plain[name], anew[name], atol=1e-6) for name in plain)
    assert kept["anew"] < 0.8 * kept["plain"]


def test_frozen_norms_stay_as_they_are_whatever_mode_is_asked_for():
    model = tiny_model(text=False)
    model.freeze_backbone_norms()
    model.eval().train()
    norms = [part for part in model.model.pixel_level_module.encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": torch.zeros(1, 64, 64, dtype=torch.int64)}
    gradients = train_step(model, **batch, text_embeds=torch.randn(5, 12))
    assert norms and not any("normalization" in name for name in gradients)
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())


def test_the_visual_part_compiles_in_one_piece_with_its_gradient():
    model, pixels = network(encoder_layers=1, decoder_layers=2).train(), torch.randn(1, 3, 64, 64)
    for norm in model.pixel_level_module.encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()

    def loss(run) -> Tensor:
        model.zero_grad()
        outputs = run(model, pixels, True)
        total = sum(value.square().mean() for values in outputs for value in values)
        total.backward()
        return total.detach(), model.pixel_level_module.decoder.encoder.layers[0].self_attn.sampling_offsets.weight.grad

    compiled = torch.compile(decoder_outputs, backend="eager", fullgraph=True)
    for found, expected in zip(loss(compiled), loss(decoder_outputs), strict=True):
        assert_close(found, expected, 1e-3)


def test_layers_are_run_by_whom_is_asked_to():
    model, ran = network(), []

    def run(function, *args):
        ran.append(function.__name__)
        return run_plainly(function, *args)

    with torch.no_grad():
        decoder_outputs(model, torch.randn(1, 3, 64, 64), False, run)
    names = {name: ran.count(name) for name in ran}
    assert names == {"residual_layer": 5, "encoder_layer": 2, "decoder_layer": 3}


# ------------------------------------------------------------------------------- networks that are not plain


def called_network(**fields) -> Mask2FormerModel:
    """One whose every layer is called where it is not plain, as the model's own is."""
    model = network(**fields)
    call_every_layer(model)
    return model


def both(model: Mask2FormerModel, pixels: Tensor) -> tuple[DecoderOutputs, DecoderOutputs]:
    """The outputs as they are, and those of transformers' forward of the same modules."""
    with torch.no_grad():
        return decoder_outputs(model, pixels, every=True), DecoderOutputs(*theirs(model, pixels))


def assert_same_outputs(found: DecoderOutputs, expected: DecoderOutputs, tolerance: float = 1e-4) -> None:
    for mine, its in zip((*found.mask_logits, *found.hidden), (*expected.mask_logits, *expected.hidden), strict=True):
        assert_close(mine, its, tolerance)


@pytest.mark.parametrize("backbone", ["basic", "swin"])
@pytest.mark.parametrize("fields", [{}, {"pre_norm": True}, {"enforce_input_projection": True}])
def test_a_network_whose_every_layer_is_called_is_transformers(backbone, fields):
    ours, pixels = called_network(backbone=backbone, **fields), torch.randn(2, 3, 64, 96)
    plain = network(backbone, **fields)
    assert list(ours.state_dict()) == list(plain.state_dict()) and is_plain(ours) and is_plain(plain)
    expected = DecoderOutputs(*theirs(plain.requires_grad_(False), pixels))
    ours.register_forward_hook(lambda *_: None)
    assert not is_plain(ours)
    with torch.no_grad():
        assert_same_outputs(decoder_outputs(ours, pixels, every=True), expected)
        last = decoder_outputs(ours, pixels, every=False)
    assert_close(last.mask_logits[0], expected.mask_logits[-1])
    assert len(last.mask_logits) == len(last.hidden) == 1


SMALL = {"encoder_layers": 1, "decoder_layers": 2, "enforce_input_projection": True}
PLACES = {
    name: layer
    for name, layer in network(**SMALL).named_modules()
    # Lists of layers are gone through and are no layers themselves, in ResNet's stages, too.
    if not isinstance(layer, nn.ModuleList) and not re.search(r"stages\.\d\.layers$", name)
}
WEIGHTY = [name for name, layer in PLACES.items() if "weight" in layer._parameters]


@pytest.mark.parametrize("hook", ["forward", "before", "patched"])
def test_a_hook_on_any_layer_runs(hook):
    model, pixels = called_network(**SMALL), torch.randn(1, 3, 32, 32)
    for name in PLACES:
        layer, runs = model.get_submodule(name), []
        if hook == "patched":
            forward = layer.forward
            layer.forward = lambda *args, forward=forward, runs=runs, **kwargs: (
                runs.append(1) or forward(*args, **kwargs)
            )
        else:
            register = layer.register_forward_hook if hook == "forward" else layer.register_forward_pre_hook
            handle = register(lambda *_, runs=runs: runs.append(1))
        with torch.no_grad():
            decoder_outputs(model, pixels, every=False)
        assert runs, name
        if hook == "patched":
            del layer.forward
        else:
            handle.remove()
        assert is_plain(model)


def test_a_hook_of_all_modules_runs():
    model, seen = called_network(**SMALL), set()
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.add(layer))
    try:
        with torch.no_grad():
            decoder_outputs(model, torch.randn(1, 3, 32, 32), every=False)
    finally:
        handle.remove()
    assert {model.get_submodule(name) for name in PLACES} <= seen


def test_what_a_hook_returns_counts_and_what_it_is_given_is_transformers():
    model, pixels = called_network(), torch.randn(1, 3, 64, 64)
    plain, shapes = network(), [[], []]
    layers = "pixel_level_module.decoder.encoder.layers.0.fc1", "transformer_module.decoder.layers.1.fc1"
    for name in layers:
        for part, seen in zip((model, plain), shapes, strict=True):
            part.get_submodule(name).register_forward_hook(
                lambda _, x, y, seen=seen: seen.append((x[0].shape, y.shape))
            )
    found, expected = both(model, pixels)
    theirs(plain, pixels)
    assert_same_outputs(found, expected)
    assert shapes[0] == shapes[1] * 2
    model.get_submodule(layers[0]).register_forward_hook(lambda _, x, y: y + 1)
    changed, expected = both(model, pixels)
    assert_same_outputs(changed, expected)
    assert (changed.hidden[-1] - found.hidden[-1]).abs().max() > 0.01


def test_gradients_reach_backward_hooks():
    model, seen = called_network(), set()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.LayerNorm)]
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.add(name))
    outputs = decoder_outputs(model, torch.randn(1, 3, 64, 64), every=True)
    sum(values.square().mean() for output in outputs for values in output).backward()
    assert seen == set(names)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", WEIGHTY)
def test_a_parametrized_weight_is_that_of_a_network_with_the_weight_itself(name):
    model, pixels = called_network(**SMALL), torch.randn(1, 3, 32, 32)
    layer = model.get_submodule(name)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_submodule(name).weight.mul_(2)
        expected = decoder_outputs(copied, pixels, every=True)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    assert is_plain(copied) and not is_plain(model)
    with torch.no_grad():
        assert_same_outputs(decoder_outputs(model, pixels, every=True), expected, 1e-3)


@pytest.mark.parametrize("name", WEIGHTY)
def test_a_replaced_layer_is_used(name):
    model, runs = called_network(**SMALL), []
    replaced = nn.Sequential(model.get_submodule(name), nn.Identity())
    replaced[1].forward = lambda output: runs.append(1) or output
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replaced)
    with torch.no_grad():
        decoder_outputs(model, torch.randn(1, 3, 32, 32), every=False)
    assert runs


def test_a_fused_backbone_is_the_backbone():
    model, pixels = called_network(backbone="bottleneck"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = decoder_outputs(model, pixels, every=True)
    for layer in model.pixel_level_module.encoder.modules():
        if hasattr(layer, "normalization"):
            layer.convolution = nn.utils.fusion.fuse_conv_bn_eval(layer.convolution, layer.normalization)
            layer.normalization = nn.Identity()
    with torch.no_grad():
        assert_same_outputs(decoder_outputs(model, pixels, every=True), expected)


def test_synchronised_norms_are_plain_and_a_foreign_backbone_does_not_count():
    model = called_network()
    assert is_plain(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    swin, runs = called_network(backbone="swin"), []
    swin.pixel_level_module.encoder.register_forward_hook(lambda *_: runs.append(1))
    assert is_plain(swin)
    with torch.no_grad():
        decoder_outputs(swin, torch.randn(1, 3, 64, 64), every=False)
    assert runs == [1]


def test_a_method_that_is_patched_on_a_class_is_called(monkeypatch):
    model, runs = called_network(), []
    kind = type(model.transformer_module.decoder.mask_predictor)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args: runs.append(1) or forward(*args))
    with torch.no_grad():
        decoder_outputs(model, torch.randn(1, 3, 32, 32), every=False)
    assert len(runs) == LAYERS["decoder_layers"]


def test_torch_func_gives_the_gradients_of_backward():
    model, pixels = called_network(encoder_layers=1, decoder_layers=2).double(), torch.randn(1, 3, 32, 32).double()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        run = nn.Module()
        run.network = model
        run.forward = lambda pixels: decoder_outputs(model, pixels, every=True).mask_logits[-1].square().mean()
        return torch.func.functional_call(run, weights, (pixels,))

    weights = {f"network.{name}": weight.detach() for name, weight in model.named_parameters()}
    found = torch.func.grad(loss)(weights)
    decoder_outputs(model, pixels, every=True).mask_logits[-1].square().mean().backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert torch.allclose(found[f"network.{name}"], weight.grad, rtol=1e-6, atol=1e-9), name


def test_a_copied_or_pickled_network_is_called_as_the_first_one():
    model, pixels = called_network(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = decoder_outputs(model, pixels, every=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        name = "transformer_module.decoder.mask_predictor.mask_embedder.1.0"
        again.get_submodule(name).weight.data.mul_(0)
        again.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            changed = decoder_outputs(again, pixels, every=True)
        assert torch.equal(decoder_outputs(model, pixels, every=True).hidden[-1], expected.hidden[-1])
        assert not torch.allclose(changed.mask_logits[0], expected.mask_logits[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_called_layers_are_made_anew_and_their_gradients_are_the_same(reentrant):
    model = tiny_model(text=False, encoder_layers=2).double().train()
    batch = {
        "pixel_values": torch.randn(2, 3, 64, 64).double(),
        "labels": torch.arange(64).expand(2, 64, 64) // 16,
        "text_embeds": torch.randn(5, 12),
    }
    decoder = model.model.transformer_module.decoder
    runs = {"pixel decoder": [], "transformer decoder": []}
    for name, layer in zip(
        runs, (model.model.pixel_level_module.decoder.encoder.layers[1], decoder.layers[1]), strict=True
    ):
        layer.fc1.register_forward_hook(lambda *_, name=name: runs[name].append(1))
    expected = train_step(model, **batch)
    assert {len(seen) for seen in runs.values()} == {1}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    found = train_step(model, **batch)
    assert {name: len(seen) for name, seen in runs.items()} == {"pixel decoder": 3, "transformer decoder": 3}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-9, name
