"""The model under other libraries: transformers' Trainer, peft, accelerate, and PyTorch's quantisation and compiler.

Where peft is not installed, its tests are skipped, and pytest says so.
"""

import os
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate import hooks
from accelerate.state import AcceleratorState
from tiny import byte_tokenizer, save_checkpoint, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, Trainer, TrainingArguments

from modeling_zs3 import Zs3ForSemanticSegmentation
from network_zs3 import is_plain
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from zs3.data.augmentation import Augmentation
from zs3.data.records import load_split
from zs3.data.samples import SegmentationDataset
from zs3.label_space import load_label_space
from zs3.scenes.dataset import write_dataset

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_left_of_an_accelerator(monkeypatch):
    """A Trainer sets up one for the process, and variables of the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def batch(labels: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    fields = {"pixel_values": torch.randn(2, 3, 64, 64), "text_embeds": F.normalize(torch.randn(5, 12), dim=-1)}
    return {**fields, "labels": torch.arange(64).expand(2, 64, 64) // 16} if labels else fields


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    """Everything that is made of the images, in one vector."""
    outputs = model(**batch())
    return torch.cat([outputs[name].flatten().float() for name in ("mask_logits", "class_embeds", "class_logits")])


def assert_same_answer(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def learner(**fields) -> Zs3ForSemanticSegmentation:
    """A model in training, whose every weight has a say: new sampling offsets and norms do not look at their input."""
    model = tiny_model(text=False, encoder_layers=2, **fields)
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                weight.normal_(0, 0.3)
    model.freeze_backbone_norms()
    return model.train()


# ------------------------------------------------------------------------------------------------ quantisation


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "names",
    [
        ("sampling_offsets",),
        ("attention_weights", "value_proj"),
        ("output_proj", "fc1", "fc2"),
        ("q_proj", "k_proj", "v_proj"),
    ],
)
def test_quantised_layers_compute_what_they_do_in_transformers_own_model(names):
    model = learner().eval()
    ours = model.config.to_dict()
    fields = {name: ours[name] for name in Mask2FormerConfig.__dataclass_fields__ if name in ours}
    plain = Mask2FormerModel(Mask2FormerConfig(**{**fields, "backbone_config": model.config.backbone_config})).eval()
    plain.load_state_dict(model.model.state_dict())
    quantised = {name for name, _ in plain.named_modules() if name.endswith(names)}
    quantise = torch.ao.quantization.quantize_dynamic
    with torch.no_grad():
        expected = quantise(plain, quantised)(batch()["pixel_values"]).masks_queries_logits[-1]
        found = quantise(model, {f"model.{name}" for name in quantised})(**batch()).mask_logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, learner().eval()(**batch()).mask_logits, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", [torch.qint8, torch.float16])
def test_a_wholly_quantised_model_answers_about_the_same(kind):
    model = learner().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=kind)
    found, expected = answer(quantised), answer(model)
    assert (found - expected).abs().mean() < 0.2 * expected.abs().mean()
    assert quantised.get_memory_footprint() < model.get_memory_footprint()


# ---------------------------------------------------------------------------------------------------- compiler


def test_a_compiled_model_answers_and_learns_the_same():
    model = tiny_model(text=False, decoder_layers=2)
    compiled = torch.compile(model, backend="eager")
    assert_same_answer(answer(compiled), answer(model))
    losses, gradients = [], []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(2)
        losses.append(run(**batch(labels=True)).loss)
        losses[-1].backward()
        gradients.append(model.model.pixel_level_module.decoder.encoder.layers[0].fc1.weight.grad.clone())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_compiled_alone_runs():
    model, runs = learner().eval(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return lambda *args: runs.append(1) or graph(*args)

    expected = answer(model)
    model.model.pixel_level_module.decoder.encoder.layers[0].compile(backend=backend)
    assert_same_answer(answer(model), expected)
    assert runs


# -------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_whose_weights_are_brought_one_layer_at_a_time(offload, buffers, tmp_path):
    model = tiny_model(class_loss="cross_entropy")
    tokens = {"input_ids": torch.tensor([[7, 8, 513], [9, 513, 513]])}
    expected, embeds = answer(model), model.encode_text(**tokens)
    where = {"offload_dir": tmp_path} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(model, execution_device=CPU, offload_buffers=buffers, **where)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert_same_answer(answer(model), expected)
    torch.testing.assert_close(model.encode_text(**tokens), embeds)
    assert model.train()(**batch(labels=True)).loss.isfinite()


@pytest.mark.parametrize("where", ["parts", "auto"])
def test_an_empty_model_is_filled_from_a_checkpoint_and_the_disk(where, tmp_path):
    model = save_checkpoint(tmp_path / "checkpoint")
    with accelerate.init_empty_weights():
        empty = Zs3ForSemanticSegmentation(model.config)
    parts = {name: "disk" if name == "model" else "cpu" for name, _ in empty.named_children()}
    placed = {"device_map": parts | {"vocabulary": "cpu"}}
    if where == "auto":
        half = {"cpu": model.get_memory_footprint() // 2}
        placed = {"device_map": "auto", "max_memory": half, "no_split_module_classes": empty._no_split_modules}
    filled = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "checkpoint", offload_folder=tmp_path / "offload", **placed
    ).eval()
    assert set(filled.hf_device_map.values()) == {"cpu", "disk"}
    assert_same_answer(answer(filled), answer(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "half on the disk"])
def test_device_maps_of_from_pretrained(device_map, tmp_path):
    model, options = save_checkpoint(tmp_path), {"device_map": device_map}
    if device_map == "half on the disk":
        options = {"device_map": "auto", "max_memory": {"cpu": model.get_memory_footprint() // 2}}
    loaded = Zs3ForSemanticSegmentation.from_pretrained(tmp_path, offload_folder=tmp_path / "offload", **options)
    assert any(weight.is_meta for weight in loaded.parameters()) == ("max_memory" in options)
    assert_same_answer(answer(loaded), answer(model))


def test_a_hook_of_accelerate_on_every_layer_runs():
    model, runs = learner().eval(), set()
    expected = answer(model)

    class Seen(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple[tuple, dict]:
            runs.add(module)
            return args, kwargs

    for layer in model.model.modules():
        hooks.add_hook_to_module(layer, Seen())
    assert_same_answer(answer(model), expected)
    assert {layer for layer in model.model.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)} <= runs
    hooks.remove_hook_from_submodules(model.model)
    assert is_plain(model.model)


# -------------------------------------------------------------------------------------------------------- peft

# One way to adapt each: the config's class, its fields, and how many layers of the model get an adapter.
ADAPTERS = {
    "LoRA on sampling_offsets": ("LoraConfig", {"target_modules": ["sampling_offsets"]}, 2),
    "LoRA on value_proj": ("LoraConfig", {"target_modules": ["value_proj"]}, 2),
    "LoRA on all linear layers": ("LoraConfig", {"target_modules": "all-linear"}, 31),
    "LoRA on convolutions": ("LoraConfig", {"target_modules": ["convolution", "mask_projection"]}, 13),
    "LoRA on embeddings": ("LoraConfig", {"target_modules": ["queries_features", "queries_embedder"]}, 2),
    "LoRA on masked attention": ("LoraConfig", {"target_modules": ["cross_attn"]}, 2),
    "DoRA": ("LoraConfig", {"target_modules": ["sampling_offsets", "fc1", "q_proj"], "use_dora": True}, 8),
    "LoHa": ("LoHaConfig", {"target_modules": ["sampling_offsets", "fc1"]}, 6),
    "IA3": ("IA3Config", {"target_modules": ["v_proj", "fc1", "fc2"], "feedforward_modules": ["fc1", "fc2"]}, 10),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_learn_change_the_answer_and_can_be_saved_and_merged(name, tmp_path):
    peft = pytest.importorskip("peft")
    kind, fields, adapted = ADAPTERS[name]
    rank = {} if kind == "IA3Config" else {"r": 2}
    before = answer(learner().eval())
    model = peft.get_peft_model(learner(), getattr(peft, kind)(**fields, **rank))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len({adapted_layer(name) for name in weights}) == adapted
    assert_same_answer(answer(model.eval()), before, 1e-3)

    optimizer = torch.optim.Adam(weights.values(), lr=0.03)
    model.train()
    for _ in range(2):  # LoRA's first factor learns only once the second is not zero any more
        optimizer.zero_grad()
        model(**batch(labels=True)).loss.backward()
        optimizer.step()
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())

    after = answer(model.eval())
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(learner(), tmp_path / "adapter").eval()
    assert_same_answer(answer(again), after)
    merged = again.merge_and_unload()
    assert is_plain(merged.model)
    assert_same_answer(answer(merged), after, 1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_answer(answer(Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "merged")), answer(merged))


def adapted_layer(name: str) -> str:
    """The layer that an adapter's weight belongs to."""
    for word in (".base_layer.", ".lora_", ".hada_", ".ia3_"):
        name = name.partition(word)[0]
    return name


@pytest.mark.parametrize("name", ["class_projection", "mask_embedder", "queries_features", "layer_1"])
def test_a_part_that_is_trained_beside_adapters_learns_and_is_saved(name, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=[name])
    model = peft.get_peft_model(learner(), config).train()
    weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad and name in key}
    optimizer = torch.optim.Adam(weights.values(), lr=0.03)
    model(**batch(labels=True)).loss.backward()
    optimizer.step()
    assert weights and all(weight.grad.abs().sum() > 0 for weight in weights.values())
    after = answer(model.eval())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(learner(), tmp_path).eval()
    assert_same_answer(answer(again), after)
    assert_same_answer(answer(again.merge_and_unload()), after, 1e-3)


def test_an_adapter_of_transformers_own_door_is_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = learner().eval()
    model.add_adapter(peft.LoraConfig(target_modules=["sampling_offsets", "fc1"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = learner().eval()
    again.load_adapter(tmp_path)
    assert_same_answer(answer(again), answer(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_learn_where_activations_are_made_anew(reentrant):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["sampling_offsets", "q_proj", "fc1"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(learner().double(), config)
    gradients = []
    for anew in (False, True):
        model.train().zero_grad()
        if anew:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(2)
        inputs = batch(labels=True)
        model(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.requires_grad])
    for anew, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(anew, kept, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------- the Trainer


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder / "made", num_train=6, num_validation=2, seed=0)
    return folder / "made"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_trainer_trains_it_in_ten_lines(scenes, tmp_path):
    processor = Zs3Processor(Zs3ImageProcessor(), byte_tokenizer())
    model, run = tiny_model(num_queries=8), str(tmp_path)
    quick = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    options = {"logging_steps": 2, "save_steps": 6, "report_to": "none", **quick}

    space = load_label_space("scenes")
    records = load_split(scenes, "train", space)
    normalised = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    dataset = SegmentationDataset(records, space, Augmentation(crop_size=64, max_size=96), **normalised)
    samples = [dataset[0, index] for index in range(len(dataset))]
    model.set_vocabulary(dataset.class_names, processor=processor)
    arguments = TrainingArguments(run, max_steps=12, learning_rate=1e-3, label_names=["labels"], **options)
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, processing_class=processor)
    trainer.train()
    trainer.save_model(f"{run}/final")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], rel=0.5)
    loaded = Zs3ForSemanticSegmentation.from_pretrained(f"{run}/final")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    predictions = trainer.predict(samples).predictions
    assert [len(values) for values in predictions] == 4 * [6]  # masks, embeddings, logits, sizes: no loss terms

    resumed = Trainer(tiny_model(num_queries=8), arguments, train_dataset=samples, processing_class=processor)
    resumed.model.set_vocabulary(dataset.class_names, processor=processor)
    resumed.train(resume_from_checkpoint=f"{run}/checkpoint-6")
    assert resumed.state.global_step == 12
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_the_trainer_evaluates_with_and_without_image_labels(options, tmp_path):
    model = learner()
    model.set_vocabulary(list("abcde"), batch()["text_embeds"])
    images, labels = batch(labels=True)["pixel_values"], batch(labels=True)["labels"]
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    labelled = [{**sample, "image_labels": torch.tensor([1, 1, 1, 1, 0])} for sample in samples]
    fields = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "max_steps": 1, **options}
    arguments = TrainingArguments(str(tmp_path), label_names=["labels"], **fields)
    for data in (samples, labelled):
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def test_what_the_config_names_as_no_prediction_is_an_output():
    names = tiny_config().keys_to_ignore_at_inference
    outputs = learner()(**batch(labels=True))
    assert set(names) <= set(outputs) and "keys_to_ignore_at_inference" not in tiny_config().to_dict()
