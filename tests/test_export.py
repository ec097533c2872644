"""The exported visual part against the model, at sizes that were not traced, where the project is not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import save_checkpoint, tiny_config, tiny_model
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import SwinConfig

from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import InputError, run
from zs3.release import export
from zs3.release.export import export_visual, main, save

SIZES = ((1, 64, 96, 4), (3, 100, 33, 1), (2, 150, 90, 7), (1, 160, 128, 40))  # B, H, W, C; traced: 2, 150, 90, 4

STRANGER = """
import sys
import numpy as np
import torch

program, data = torch.export.load(sys.argv[1]).module(), np.load(sys.argv[2])
outputs = {}
for case in {name.split(".")[0] for name in data}:
    inputs = [torch.from_numpy(data[f"{case}.{name}"]) for name in ("pixel_values", "text_embeds")]
    for name, output in zip(("class_probs", "mask_logits"), program(*inputs)):
        outputs[f"{case}.{name}"] = output.detach().numpy()
np.savez(sys.argv[3], **outputs)
assert not {"transformers", "modeling_zs3", "zs3"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def model() -> Zs3ForSemanticSegmentation:
    """With all that the visual part is without, and with the background that it is not without."""
    model = tiny_model(vision=True, class_loss="cross_entropy", decoder_layers=2)
    model.set_vocabulary(["cat", "dog"], torch.randn(2, 12))
    return model


@pytest.fixture(scope="module")
def program(model) -> ExportedProgram:
    return export_visual(model)


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Pixels and text vectors of other sizes than those traced."""
    torch.manual_seed(0)
    return {
        f"{batch}x{height}x{width}x{classes}": (torch.randn(batch, 3, height, width), torch.randn(classes, 12))
        for batch, height, width, classes in SIZES
    }


def check_equal(model: Zs3ForSemanticSegmentation, outputs: dict[str, np.ndarray]) -> None:
    """outputs: CASE.class_probs and CASE.mask_logits of every case."""
    for case, (pixel_values, text_embeds) in cases().items():
        with torch.no_grad():
            expected = model(pixel_values, text_embeds=text_embeds)
        for name in ("class_probs", "mask_logits"):
            ours = torch.from_numpy(outputs[f"{case}.{name}"])
            torch.testing.assert_close(ours, getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_a_saved_program_is_the_model_where_neither_is_known(model, program, tmp_path):
    save(program, tmp_path / "visual.pt2")
    inputs = {}
    for case, (pixel_values, text_embeds) in cases().items():
        inputs |= {f"{case}.pixel_values": pixel_values.numpy(), f"{case}.text_embeds": text_embeds.numpy()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    files = [tmp_path / name for name in ("visual.pt2", "inputs.npz", "outputs.npz")]
    process = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *files], capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr[-4000:]
    check_equal(model, dict(np.load(tmp_path / "outputs.npz")))


def test_towers_and_vocabulary_stay_behind_and_the_model_stays_whole(model, program):
    weights = {name.removeprefix("model.") for name in program.state_dict}
    own = {name for name in model.state_dict() if name.startswith(("model.", "class_projection.", "background_embed"))}
    assert {name if name in own else f"model.{name}" for name in weights} <= own
    assert not any("text" in name or "vision" in name or "vocabulary" in name for name in weights)
    assert model.text_model is not None and model.vision_model is not None and model.vocabulary.shape == (2, 12)
    assert model.config.text_config is not None and model.config.vision_config is not None


def test_onnx_is_the_model_too(model, program, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="nothing here runs ONNX files")
    save(program, tmp_path / "visual.onnx")
    session = runtime.InferenceSession(str(tmp_path / "visual.onnx"))
    outputs = {}
    for case, (pixel_values, text_embeds) in cases().items():
        inputs = {"pixel_values": pixel_values.numpy(), "text_embeds": text_embeds.numpy()}
        names = ("class_probs", "mask_logits")
        for name, output in zip(names, session.run(names, inputs), strict=True):
            outputs[f"{case}.{name}"] = output
    check_equal(model, outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["visual.onnx"]


def test_what_cannot_be_exported_is_said_in_words():
    with pytest.raises(InputError, match="call model.eval"):
        export_visual(tiny_model(text=False).train())
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    with pytest.raises(InputError, match="Swin backbone cannot be exported"):
        export_visual(Zs3ForSemanticSegmentation(tiny_config(text=False, backbone_config=swin.to_dict())).eval())


# ------------------------------------------------------------------------------------------------- the command


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * 2


@pytest.fixture
def small(monkeypatch) -> None:
    """A program that is exported in no time in place of the visual part."""
    program = torch.export.export(Doubled(), (torch.ones(2),))
    monkeypatch.setattr(export, "export_visual", lambda model: program)


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    main()


def test_the_command_writes_the_file_and_nothing_else(small, monkeypatch, tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "made" / "visual.pt2"
    command(monkeypatch, "--model", tmp_path / "checkpoint", "--output", output)
    assert torch.export.load(output).module()(torch.tensor([-1.0, 3.0])).tolist() == [0, 6]
    assert [path.name for path in output.parent.iterdir()] == ["visual.pt2"]
    assert str(output) in capsys.readouterr().out


def test_a_file_that_cannot_be_written_leaves_the_old_one(small, monkeypatch, tmp_path):
    def full_disk(program, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    save_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "made" / "visual.pt2"
    output.parent.mkdir()
    output.write_text("old")
    monkeypatch.setattr(torch.export, "save", full_disk)
    with pytest.raises(SystemExit) as stop:
        run(lambda: command(monkeypatch, "--model", tmp_path / "checkpoint", "--output", output))
    assert stop.value.code == 2
    assert output.read_text() == "old" and len(list(output.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "here"], "--output is missing"),
        (["--model", "here", "--output", "visual.pth"], r"visual.pth: the suffix says the kind, .pt2 .* or .onnx"),
        (["--model", "here", "--output", "visual.onnx"], r"needs onnxscript: pip install .*\[export\]"),
        (["--model", "./nowhere", "--output", "visual.pt2"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, flags, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(InputError, match=message) as error:
        command(monkeypatch, *flags)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_weights_is_refused(small, monkeypatch, tmp_path):
    model = save_checkpoint(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name != "class_projection.0.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match="incomplete: it lacks class_projection.0.weight"):
        command(monkeypatch, "--model", tmp_path, "--output", tmp_path / "visual.pt2")
