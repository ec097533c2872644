"""The benchmarks at toy sizes: that they run, that they compare what they say, and what the criterion is equal to."""

import itertools
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from tiny import save_checkpoint, tiny_config, tiny_mask2former, tiny_model

import network_zs3
from benchmarks import (
    assembled,
    clip_views,
    criterion,
    day_one,
    ensemble_encoders,
    evaluator,
    gradient_sizes,
    label_count,
    loader,
    made_labels,
    measuring,
    network,
    paper_tables,
    photograph_cells,
    power,
    pseudo_label_quality,
    pseudo_labels,
    region_views,
    text_side,
    train_step,
)
from configuration_zs3 import RegionView
from eval import main as eval_main
from zs3.command_line import read_arguments
from zs3.data.image_labels import PseudoLabels
from zs3.data.records import load_split
from zs3.label_space import load_label_space
from zs3.pseudo_labels import PseudoLabelArgs, make_pseudo_labels
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, UNSEEN

PAIRS = ((0.1, 0.2), (0.2, 0.4), (0.3, 0.6))  # scores of two ways with three class splits
CLIP_FOLDER = str(Path(__file__).parent.parent / "zs3" / "scenes_clip")


@pytest.fixture
def call(monkeypatch):
    def call(module, **flags: object) -> None:
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", [module.__file__, *words])
        module.main()

    return call


@pytest.fixture
def same_process(monkeypatch):
    monkeypatch.setattr(measuring, "in_fresh_process", lambda function, *args, start="": function(*args))


SMALL = {"batch_size": 2, "queries": 12, "outputs": 3, "size": 64, "class_names": 9, "points": 100, "rounds": 1}


def test_terms_equal_transformers_and_the_table_says_so(call, tmp_path, capsys):
    call(criterion, **SMALL, classes="2 5", device="cpu", output=tmp_path / "criterion.json")
    result = json.loads((tmp_path / "criterion.json").read_text())
    assert result["command"].startswith("python -m benchmarks.criterion --batch_size 2 ")
    assert [row["classes"] for row in result["results"]] == [2, 5]
    for comparison in result["results"]:
        assert comparison["largest_difference"] < 1e-5
        for row in comparison["criteria"].values():
            assert row["seconds"] > 0 and row["peak_mib"] > 0
        assert comparison["criteria"][criterion.PEER]["times_faster"] == 1
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "criterion.md").read_text() and printed.count("| 5 |") == 4


def test_a_criterion_that_differs_is_no_comparison(call, monkeypatch, same_process):
    monkeypatch.setitem(criterion.SAME_LOSSES, "mask_loss", "focal")
    with pytest.raises(ValueError, match="the two criteria differ by .*: their speed cannot"):
        call(criterion, **SMALL, classes="2", device="cpu")


def test_peak_memory_is_what_is_held_at_once():
    def step(values: int) -> None:
        first = torch.ones(values)
        second = first + 1
        del first
        second * 2

    assert measuring.allocated_peak(lambda: step(2**18), measuring.CPU) == pytest.approx(2, abs=0.01)  # two of 1 MiB
    assert measuring.resident_peak(lambda: step(2**23)) == pytest.approx(64, abs=4)


def test_gradient_norms_are_those_of_each_term_alone():
    model = tiny_model(text=False, class_temperature=0.1, rank_weight=3.0)
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": torch.arange(64).expand(1, 64, 64) // 16}
    text_embeds = F.normalize(torch.randn(5, 12), dim=-1)
    torch.manual_seed(1)
    norms = gradient_sizes.gradient_norms(model, [batch], text_embeds)
    assert set(norms) == {"class", "mask", "dice", "rank"}
    for name, weight in {"class": 2.0, "mask": 5.0, "dice": 5.0, "rank": 3.0}.items():
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch, text_embeds=text_embeds).loss_terms[name].backward()
        squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        assert norms[name] == pytest.approx(weight * squares**0.5, rel=1e-3)


def test_gradient_sizes_of_a_short_training(call, tmp_path, capsys):
    write_dataset(tmp_path / "scenes", num_train=16, num_validation=1, seed=0)
    save_checkpoint(tmp_path / "stage1")
    flags = {"dataset": tmp_path / "scenes", "init_from": tmp_path / "stage1", "output_dir": tmp_path / "run"}
    call(gradient_sizes, **flags, steps=1, batches=1, output=tmp_path / "sizes.json")
    norms = json.loads((tmp_path / "sizes.json").read_text())["norms"]
    assert list(norms) == ["random weights", "start of stage 2", "after 1 steps"]
    assert all(value > 0 for column in norms.values() for value in column.values())
    assert (tmp_path / "sizes.md").read_text().count("\n") == 12


SHORT = {"labels": 5, "templates": 2, "layers": 1, "width": 32, "rounds": 1, "entries": "10 20"}


def test_the_text_side_says_how_long_each_way_took(call, tmp_path, capsys):
    call(text_side, **SHORT, output=tmp_path / "text.json")
    result = json.loads((tmp_path / "text.json").read_text())
    assert list(result["seconds"])[:2] == ["all prompts padded to 77", "first call"] and len(result["seconds"]) == 5
    assert all(value > 0 for value in result["seconds"].values())
    # "a photo of a wall." and "This is a photo of a wall", each with start and end; "building, edifice" has two more.
    assert result["longest"] == 11 and result["tokenizer"] == "one token a word"
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "text.md").read_text() and printed.count("\n|") == 14


def test_text_vectors_that_differ_are_no_comparison(call, monkeypatch):
    monkeypatch.setattr(text_side.TextCache, "embed", lambda self, labels, model, processor: torch.ones(5, 512))
    with pytest.raises(ValueError, match="the two ways of padding differ"):
        call(text_side, **SHORT)


def test_a_tokenizer_that_is_not_there_is_named(call, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name[-10:]}: bpe_simple_vocab_16e6.txt.gz cannot be read"):
        call(text_side, **SHORT, tokenizer=tmp_path)


FEW = {"labels": "5 70", "size": 64, "large_labels": 9, "large_size": 96, "queries": 12, "rounds": 1}
FEW |= {"picture_labels": 6, "picture_width": 256}


def test_label_stages_are_measured_and_those_too_large_are_not(call, tmp_path, capsys, same_process):
    call(label_count, **FEW, checked=70 * 1500, memory_limit=0.03, output=tmp_path / "labels.json")
    result = json.loads((tmp_path / "labels.json").read_text())
    skipped = [row for row in result["rows"] if "seconds" not in row]
    assert len(result["rows"]) == 2 * 3 * 5
    assert {(row["labels"], row["method"]) for row in skipped} == {(70, label_count.PEER)}
    for row in result["rows"]:
        if row in skipped:
            assert row["bytes_needed"] > 0.03e9
            continue
        assert row["seconds"] > 0 and row["calls"] == 1 and row["peak_mib"] >= 0
        if row["method"] != label_count.PEER:  # which resizes by way of 384 x 384
            assert row["differing_share"] < 1e-3
    checks = [(row["wrong_pixels"], row["checked_pixels"]) for row in result["rows"] if "wrong_pixels" in row]
    assert checks == 2 * [(0, 64 * 64), (0, 1500), (0, 96 * 96)]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "labels.md").read_text()
    assert printed.count("| would need 0.057 GB |") == 2 and "; at 70 labels 1500 random ones." in printed


def test_wrong_label_maps_are_no_comparison(call, monkeypatch, same_process):
    exact = label_count.semantic_map
    monkeypatch.setattr(label_count, "semantic_map", lambda *args: (exact(*args) + 1) % 5)
    with pytest.raises(ValueError, match="wrong pixels: its speed cannot"):
        call(label_count, **FEW)


@pytest.mark.parametrize("kind", label_count.KINDS)
def test_transformers_is_given_the_same_problem(kind):
    proposals = label_count.draw_proposals(label_count.Case(kind, 7, 384), 12)
    theirs, ours = (label_count.label_stage(m, proposals, 384)() for m in (label_count.PEER, label_count.OURS))
    assert (theirs != ours).float().mean() < 1e-3  # at this size it does not resize twice


def test_a_measurement_in_a_process_of_its_own():
    case = label_count.Case("soft", 9, 64)
    args = label_count.LabelCountArgs(queries=12, rounds=1)
    row = label_count.apart(label_count.measure, args, case, label_count.DENSE)
    assert row["seconds"] > 0 and row["label_map"].shape == (64, 64)


@pytest.fixture(scope="module")
def scenes_model(tmp_path_factory):
    """A folder of scenes and an untrained checkpoint with both towers."""
    folder = tmp_path_factory.mktemp("scenes_model")
    write_dataset(folder / "scenes", num_train=3, num_validation=2, seed=0)
    seen = [name for name in CLASS_NAMES if name not in UNSEEN]
    save_checkpoint(folder / "model", vision=True, seen_class_names=seen)
    return folder


LITTLE = {"proposals": 3, "size": 64, "rounds": 1, "layers": 1}


def test_views_are_measured_beside_the_loop(call, tmp_path, capsys):
    call(clip_views, **LITTLE, output=tmp_path / "views.json")
    result = json.loads((tmp_path / "views.json").read_text())
    assert [row["way"] for row in result["cost"]] == [clip_views.LOOP, clip_views.CROPS, clip_views.SINGLE]
    assert result["cost"][0]["times_faster_than_loop"] == 1 and all(row["seconds"] > 0 for row in result["cost"])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "views.md").read_text() and "batched crops" in printed


def test_embeddings_that_differ_are_no_comparison(monkeypatch):
    monkeypatch.setattr(clip_views, "batched", lambda tower, image, masks: torch.ones(len(masks), 512))
    with pytest.raises(ValueError, match="embeddings of loop and batch differ"):
        clip_views.measure_cost(clip_views.ClipViewsArgs(**LITTLE))


def test_pseudo_labels_are_measured_beside_the_loop(call, scenes_model, tmp_path, monkeypatch, capsys):
    def in_this_process(flags, processes):
        args, _ = read_arguments(PseudoLabelArgs, flags)
        make_pseudo_labels(args)
        return float(args.max_images)

    monkeypatch.setattr(pseudo_labels, "command_seconds", in_this_process)
    places = {"model": scenes_model / "model", "dataset": scenes_model / "scenes", "output": tmp_path / "p.json"}
    call(pseudo_labels, **places, few=1, many=3, shard_size=1)
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["images_per_second"] for row in rows[1:]] == [1.0, 1.0]
    assert rows[0]["times_faster_than_loop"] == 1 and rows[2]["times_faster_than_first"] == 1
    assert capsys.readouterr().out == (tmp_path / "p.md").read_text()
    monkeypatch.setattr(pseudo_labels, "SAME", -1)
    with pytest.raises(ValueError, match="scores of loop and command differ"):
        call(pseudo_labels, **places, few=1, many=3, shard_size=1)


def test_the_quality_of_pseudo_labels_is_that_of_the_command(call, scenes_model, tmp_path, capsys):
    places = {"model": str(scenes_model / "model"), "dataset": str(scenes_model / "scenes")}
    more = {"encoders": CLIP_FOLDER, "max_images": 2, "output": tmp_path / "quality.json"}
    call(pseudo_label_quality, **places, shares="0 0.5 1", **more)
    result = json.loads((tmp_path / "quality.json").read_text())
    asked = [{"unannotated_share": share} for share in (0, 0.5, 1)]
    asked += [{"encoder": own, "region_view": view} for own in (None, CLIP_FOLDER) for view in get_args(RegionView)]
    for place, (row, options) in enumerate(zip(result["shares"] + result["scorers"], asked, strict=True)):
        flags = options | {"max_images": 2, "output": str(tmp_path / f"{place}")}
        make_pseudo_labels(PseudoLabelArgs(**places, **flags))
        summary = json.loads((tmp_path / f"{place}" / "summary.json").read_text())
        assert row["right_labels"] == sum(summary["images_with_class"]) > 0
        assert row["average_precision"] == summary["average_precision"]["macro"]
        own = {threshold["threshold"]: threshold for threshold in summary["thresholds"]}[row["threshold"]]
        assert row["labels"] == sum(own["labels"]) and row["recall"] == own["recall"]["micro"]
    assert capsys.readouterr().out == (tmp_path / "quality.md").read_text()


def test_checkpoints_at_real_size_are_timed_part_by_part(call, tmp_path, capsys, same_process, monkeypatch):
    monkeypatch.setattr(measuring, "resident_peak", lambda step: step() or 1.0)
    sizes = {"width": 48, "height": 32, "short_edge": 32, "labels": "2 3", "output": tmp_path / "a.json"}
    call(assembled, swins="Swin-T", encoders="TIPSv2_B/14", **sizes, tiny=True)
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(row["seconds"])[:3] == ["proposals", "image tower", "text, 2 labels"] and len(row["seconds"]) == 6
    assert all(value > 0 for value in row["seconds"].values()) and row["peak_mib"] > 0
    assert capsys.readouterr().out == (tmp_path / "a.md").read_text()


@pytest.fixture
def evaluate_here(monkeypatch):
    """eval.py runs in this process."""

    def evaluate(script, processes, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        eval_main()

    monkeypatch.setattr(day_one, "launch", evaluate)
    monkeypatch.setattr(ensemble_encoders, "launch", evaluate)


@pytest.fixture
def proposals(tmp_path, monkeypatch):
    """Flags of a benchmark of names without training."""
    write_dataset(tmp_path / "scenes", num_train=1, num_validation=4, seed=0)
    tiny_mask2former().save_pretrained(tmp_path / "proposals")
    return {"proposals": tmp_path / "proposals", "dataset": tmp_path / "scenes", "folder": tmp_path / "joined"}


def test_names_without_training_are_evaluated_and_their_towers_timed(
    call, proposals, evaluate_here, tmp_path, monkeypatch, capsys
):
    """One of the ways."""
    monkeypatch.setattr(day_one, "WAYS", {day_one.CROPS: day_one.WAYS[day_one.CROPS]})
    call(day_one, **proposals, pictures=1, output=tmp_path / "d.json")
    result = json.loads((tmp_path / "d.json").read_text())
    assert result["command"].startswith("python -m benchmarks.day_one --proposals")
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == [day_one.RIGHT, day_one.CROPS, f"{day_one.CROPS}, objectness"]
    assert all(0 <= row["hiou"] <= 1 and row.get("seconds", 1) > 0 for row in rows.values())
    assert rows[day_one.RIGHT]["hiou"] >= rows[day_one.CROPS]["hiou"] and rows[day_one.CROPS]["of_crops"] == 1
    assert capsys.readouterr().out.endswith((tmp_path / "d.md").read_text())


def test_means_over_splits_are_those_of_the_differences():
    results = [[{"way": day_one.CROPS, "hiou": low}, {"way": "other", "hiou": high}] for low, high in PAIRS]
    first, second = day_one.over_splits([*results[:2], [*results[2], {"way": "in one alone", "hiou": 0.9}]])
    assert first == {"way": day_one.CROPS, "hiou": pytest.approx(0.2), "gain": 0, "interval": [0, 0]}
    assert second["hiou"] == pytest.approx(0.4) and second["gain"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of 2 degrees of freedom; the gains 0.1, 0.2 and 0.3 deviate by 0.1
    assert second["interval"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-5)


def test_what_the_tower_sees_is_compared_with_crops(call, proposals, tmp_path, monkeypatch, capsys):
    """Where every proposal is among the largest, nothing differs from crops."""
    monkeypatch.setattr(region_views, "SIDES", (1.0, 2.0, 3.0))
    monkeypatch.setattr(region_views, "LARGEST", (1, 99))
    call(region_views, **proposals, pairs=1, mosaics=1, output=tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    found = {(row["encoder"], row["pictures"], row["way"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 2 + 2 * ((1 + 3) + (1 + 3 + 3) + (1 + 4 + 3))
    for ground in ("scenes", "pairs", "mosaics"):
        row = found["tiny CLIP", ground, "mixed: crops of the 99 largest"]
        assert row["other_pixels"] == 0 and row["of_crops"] == 1
    assert all(row["other_pixels"] == 0 and row["of_crops"] == 1 for row in rows if row["way"] == "crops")
    assert any(row["other_pixels"] > 0 for row in rows)
    assert capsys.readouterr().out.endswith((tmp_path / "r.md").read_text())


@pytest.mark.parametrize("count", [2, 4])
def test_the_windows_of_joined_scenes_are_the_scenes(count):
    scenes = [
        region_views.Picture(torch.rand(3, 32, 48), torch.randn(2, 8, 12), torch.full((32, 48), place))
        for place in range(count)
    ]
    whole = region_views.joined(scenes)
    assert whole.size == (32 * count // 2, 96) and len(whole.mask_logits) == 2 * count
    for place, scene in enumerate(scenes):
        part = whole.part(32 * (place // 2), 48 * (place % 2), 32, 48)
        own = part._replace(mask_logits=part.mask_logits[2 * place : 2 * place + 2])
        for mine, its in zip(own, scene, strict=True):
            assert torch.equal(mine, its)


def test_ensembles_with_other_encoders_are_compared_with_none(call, scenes_model, evaluate_here, tmp_path, capsys):
    places = {"models": scenes_model / "model", "dataset": scenes_model / "scenes", "folder": tmp_path / "results"}
    call(ensemble_encoders, **places, encoders=CLIP_FOLDER, output=tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [(row["encoder"], row["view"]) for row in rows] == [
        ("off", "off"),
        *((encoder, view) for encoder in ("its own CLIP", "scenes_clip") for view in get_args(RegionView)),
    ]
    assert rows[0]["gain"] == 0
    for row in rows[1:]:
        assert row["gain"] == pytest.approx(row["hiou"] - rows[0]["hiou"])
    for row, view in zip(rows[-3:], get_args(RegionView), strict=True):
        digests = (ensemble_encoders.short(str(path)) for path in (places["models"], CLIP_FOLDER))
        name = "_".join([*digests, view, "0.8_validation"])
        result = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert result["settings"]["encoder"] == CLIP_FOLDER and result["clip_ensemble"] == view
        assert result["hiou"] == row["hiou"]
    assert capsys.readouterr().out.endswith((tmp_path / "e.md").read_text())


def test_the_loader_is_measured_on_the_same_samples_however_they_come(call, tmp_path, capsys, same_process):
    sizes = {"crop_size": 64, "short_edges": "64 96", "num_images": 8, "samples": 10, "num_workers": 1}
    sizes |= {"memory_samples": 4, "steps": 1, "sizes": "160 120 320 240"}
    call(loader, **sizes, output=tmp_path / "loader.json")
    result = json.loads((tmp_path / "loader.json").read_text())
    rows = {(row["pictures"], row["loader"]): row for row in result["results"]}
    assert len(rows) == 2 * (1 + 4) and result["model_images_per_second"] > 0
    for (pictures, name), row in rows.items():
        assert row["times_faster"] == row["samples_per_second"] / rows[pictures, loader.PEER]["samples_per_second"]
        assert (name == loader.PEER) or row["mib_end"] > 0
    assert (tmp_path / "loader.md").read_text() in capsys.readouterr().out


def test_the_order_of_the_ancestors_gives_samples_of_the_same_picture(tmp_path):
    args = loader.LoaderBenchArgs(crop_size=48, short_edges=[64])
    loader.write_pictures(tmp_path / "data", "train", load_label_space(args.label_space), (160, 120), 8, 0)
    theirs = loader.make_dataset(args, str(tmp_path / "data"), False, loader.WholeFirst)
    places = {name: index for index, name in enumerate(theirs.label_space.class_names)}
    for index in range(8):
        sample, record = theirs[0, index], theirs.records[index]
        present = {theirs.class_names[place] for place in sample["labels"].unique().tolist() if place >= 0}
        assert present and {places[name] for name in present} <= set(record.label.ravel().tolist())


@pytest.fixture
def tiny_networks(monkeypatch, same_process):
    """The benchmarks of the network at toy size, in this process."""
    config = tiny_config(text=False)
    sizes = {"hidden_dim", "feature_size", "mask_feature_size", "encoder_feedforward_dim", "encoder_layers"}
    sizes |= {"dim_feedforward", "decoder_layers", "num_attention_heads", "num_queries"}
    monkeypatch.setattr(network, "ARCHITECTURE", {name: getattr(config, name) for name in sizes})
    monkeypatch.setitem(network.BACKBONES, "resnet50", lambda: tiny_config(text=False).backbone_config)


FORWARD = {"backbones": "resnet50", "sizes": 64, "class_names": 5, "rounds": 2, "gemm_size": 64, "device": "cpu"}


def cells(printed: str, name: str) -> list[str]:
    """Of the first row of the printed tables that has this cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    return next(row for row in rows if name in row)


def test_the_network_beside_transformers_with_ratio_and_floor_as_the_seconds_say(
    call, tmp_path, capsys, monkeypatch, tiny_networks
):
    seconds = {network.PEER: [3.0, 8.0, 10.0], network.OURS: [2.0, 2.0, 4.0], network.GEMM: [1.0, 0.5, 2.0]}
    monkeypatch.setattr(measuring, "take_turns", lambda steps, rounds, device: {name: seconds[name] for name in steps})
    places = {"output": tmp_path / "network.json", "profile": tmp_path / "operators.txt"}
    call(network, **FORWARD, modes="eager", **places)
    row = json.loads((tmp_path / "network.json").read_text())["results"][0]
    ours, peer = row["networks"][network.OURS], row["networks"][network.PEER]
    assert row["largest_difference"] < 1e-4 and peer["times_faster"] == 1
    assert ours["seconds"] == 2 and ours["times_faster"] == 2.5  # of 1.5, 4 and 2.5
    assert row["operations_per_second"] == 2 * 64**3 / 0.5
    assert row["floor_seconds"] == row["operations"] / row["operations_per_second"] > 0
    assert ours["times_the_floor"] == pytest.approx(2 / row["floor_seconds"])
    assert ours["peak_mib"] > 0 and ours["peak_share"] == ours["peak_mib"] / peer["peak_mib"]
    for parts in (ours["parts"], peer["parts"]):
        assert list(parts) == list(peer["parts"]) and len(parts) == 5 and min(parts.values()) > 0
    floors = [part["floor_seconds"] for part in row["parts_floor"].values()]
    assert sum(floors) == pytest.approx(row["floor_seconds"]) and min(floors[:4]) > 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "network.md").read_text()
    assert cells(printed, network.OURS)[:6] == ["resnet50", "64", "eager", network.OURS, "2.0000", "2.50"]
    assert (tmp_path / "operators.txt").read_text().count("aten::addmm") == 2


@pytest.mark.parametrize("module", [network, train_step])
def test_networks_that_differ_are_no_comparison(call, monkeypatch, tiny_networks, module):
    make_peer = network.make_peer

    def wrong_peer(*args, **losses):
        model = make_peer(*args, **losses)
        model.model.pixel_level_module.decoder.mask_projection.bias.data[0] += 1
        return model

    monkeypatch.setattr(network, "make_peer", wrong_peer)
    with pytest.raises(ValueError, match="resnet50, 64, .*eager: .*mask logits.* differ"):
        call(module, **(FORWARD if module is network else STEP), modes="eager")


def test_operations_of_every_kind_of_product_are_counted():
    image, rows = torch.randn(2, 3, 10, 10), torch.randn(2, 7, 8)
    with torch.inference_mode():
        assert network.operations(lambda: torch.nn.Conv2d(3, 5, 3)(image)) == 2 * (2 * 64) * (9 * 3) * 5
        assert network.operations(lambda: torch.nn.Linear(8, 6)(rows)) == 2 * 14 * 8 * 6
        assert network.operations(lambda: rows @ rows.mT) == 2 * 2 * 7 * 8 * 7
        heads = rows[:, None]  # (B, 1, 7, 8): with an axis of heads it runs fused
        attention = network.operations(lambda: F.scaled_dot_product_attention(heads, heads, heads))
        assert attention == 2 * (2 * 2 * 7 * 8 * 7)


def test_the_floor_is_that_of_this_network_and_not_of_transformers(tiny_networks, monkeypatch):
    """Counting must not hook the modules: then transformers' own forward would run, which has more operations."""
    monkeypatch.setattr(network_zs3, "transformers_outputs", None)
    ours = network.make_zs3("resnet50").eval()
    with torch.inference_mode():
        texts = torch.randn(3, ours.config.projection_dim)
        assert network.operations(lambda: ours(torch.randn(1, 3, 64, 64), text_embeds=texts)) > 10**6
    layer = torch.nn.Linear(5, 7)
    assert network.operations(lambda: layer(torch.randn(3, 5))) == 2 * 3 * 5 * 7


def test_seconds_of_parts_are_those_of_a_part_without_the_parts_inside(monkeypatch, tiny_networks):
    clock = iter([0, 1, 3, 7, 15, 31, 63, 127, 255, 511])
    monkeypatch.setattr(network.time, "perf_counter", lambda: float(next(clock)))
    model = network.make_peer("resnet50", 5, network.make_zs3("resnet50"))
    images = torch.randn(1, 3, 64, 64)
    seconds = network.seconds_of_parts(network.parts_of(model), lambda: model(images), 1, torch.device("cpu"))
    # Backbone from 1 to 3, pixel decoder from 7 to 63 with its encoder from 15 to 31, transformer from 127 to 255.
    assert list(seconds.values()) == [2, 16, 40, 128, 325]


STEP = {**FORWARD, "classes": 3, "points": 64}


def test_a_training_step_beside_transformers_with_ratios_as_the_seconds_say(
    call, tmp_path, capsys, monkeypatch, tiny_networks
):
    take_turns, taken = measuring.take_turns, []

    def turns(steps, rounds, device):
        taken.append(take_turns(steps, rounds, device))
        return taken[-1]

    monkeypatch.setattr(measuring, "take_turns", turns)
    monkeypatch.setattr(network, "operator_table", lambda step, device: "operators")  # takes the profiler seconds
    call(train_step, **STEP, norms="frozen", output=tmp_path / "step.json", profile=tmp_path / "operators.txt")
    (row,), (seconds,) = json.loads((tmp_path / "step.json").read_text())["results"], taken
    printed, peer = capsys.readouterr().out, row["networks"][train_step.PEER]
    assert printed == (tmp_path / "step.md").read_text()
    assert row["norms"] == "frozen" and row["largest_difference"] < 1e-4 and row["gradient_difference"] < 1e-4
    for name in (train_step.SAME, train_step.EQ8):
        figures = row["networks"][name]
        ratios = [theirs / own for theirs, own in zip(seconds[network.PEER], seconds[name], strict=True)]
        assert figures["times_faster"] == pytest.approx(sum(ratios) / 2)
        assert figures["times_the_floor"] == pytest.approx(figures["seconds"] / row["floor_seconds"])
        assert figures["peak_share"] == pytest.approx(figures["peak_mib"] / peer["peak_mib"])
        shown = [f"{figures['seconds']:.3f}", f"{figures['times_faster']:.2f}"]
        assert cells(printed, name)[2:7] == ["frozen", "eager", name, *shown]
    assert (tmp_path / "operators.txt").read_text().count("\noperators\n") == 3


def test_a_gradient_that_differs_is_no_comparison(call, monkeypatch, tiny_networks):
    make_peer = network.make_peer

    def half_detached(*args, **losses):
        peer = make_peer(*args, **losses)
        peer.model.transformer_module.queries_features.weight.register_hook(lambda grad: 2 * grad)
        return peer

    monkeypatch.setattr(network, "make_peer", half_detached)
    with pytest.raises(ValueError, match="live, eager: .*gradients of the mask logits differ"):
        call(train_step, **STEP, norms="live")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", [train_step.PEER, train_step.SAME])
def test_a_step_trains_all_weights_but_those_of_frozen_norms(tiny_networks, name, frozen):
    zs3 = network.make_zs3("resnet50")
    model = network.make_peer("resnet50", 5, zs3) if name == train_step.PEER else zs3
    model.train()
    if frozen:
        train_step.freeze_norms(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    labels, text_embeds = torch.arange(64).expand(2, 64, 64) // 16, torch.randn(5, zs3.config.projection_dim)
    args = train_step.TrainStepArgs(class_names=5)
    train_step.make_steps(args, {name: model}, torch.randn(2, 3, 64, 64), text_embeds, labels)[name]()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    norms = {key for key, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert any(key.rpartition(".")[0] in norms for key in changed) is not frozen
    assert "model.transformer_module.queries_features.weight" in changed
    assert all(weight.grad is None for weight in model.parameters())


def test_compiled_networks_are_compared_with_the_eager_one(call, tmp_path, monkeypatch, tiny_networks):
    called = []  # functions made by torch.compile, which would take minutes

    def compiled(function, **kwargs):
        return lambda *args, **kwargs: called.append(function) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    call(network, **FORWARD, modes="eager compiled", output=tmp_path / "network.json")
    eager, row = json.loads((tmp_path / "network.json").read_text())["results"]
    assert len(set(called)) == 2 and row["graph_breaks"] == {network.OURS: 0, network.PEER: 0}
    assert row["operations"] == eager["operations"] and row["largest_difference"] < 1e-4
    call(train_step, **STEP, norms="frozen", modes="compiled")
    assert len(set(called)) == 2 + 3


def test_graph_breaks_are_counted():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return 2 * x

    for function, breaks in ((broken, 1), (torch.sin, 0)):
        compiled = torch.compile(function, backend="eager")
        assert network.graph_breaks(lambda compiled=compiled: compiled(torch.ones(2))) == breaks


EVALUATOR = {"height": 64, "width": 96, "maps": 2, "rounds": 2, "images": "2 9", "kept_images": 4}
EVALUATOR |= {"bootstrap_images": 30, "resamples": 20, "device": "cpu"}


def test_the_evaluator_is_measured_beside_an_inference(call, tmp_path, capsys, monkeypatch, tiny_networks):
    seconds = {"inference": [2.0, 4.0], "objects": [0.1, 0.4], "noise": [1.0, 1.0], "bootstrap": [7.0]}
    seconds |= {evaluator.COUNTED: [0.2, 0.2], evaluator.PLAIN: [0.1, 0.2], evaluator.SCORED: [0.4, 0.8]}

    def measured(steps, rounds, device=None):
        for step in steps.values():
            step()
        return {name: seconds[name] for name in steps}

    monkeypatch.setattr(measuring, "take_turns", measured)
    call(evaluator, **EVALUATOR, classes="12 30", output=tmp_path / "evaluator.json")
    result = json.loads((tmp_path / "evaluator.json").read_text())
    assert [(row["classes"], row["maps"]) for row in result["times"]] == [
        (classes, kind)
        for classes in (12, 30)
        for kind in (evaluator.OBJECTS, evaluator.NOISE, evaluator.COUNTED, evaluator.CALIBRATED)
    ]
    row = result["times"][0]
    assert row["seconds"] == pytest.approx(0.125) and row["images_per_second"] == pytest.approx(8)
    assert row["share_of_inference"] == pytest.approx((0.05 / 2 + 0.2 / 4) / 2)  # two maps a round
    shares = [row["share_of_inference"] for row in result["times"][2:4]]
    assert shares == pytest.approx([(0.2 / 2 + 0.2 / 4) / 2, (0.5 / 2 + 0.8 / 4) / 2])  # one image a round
    assert [(row["way"], row["images"]) for row in result["memory"]] == [
        *[(evaluator.OURS, images) for images in (2, 9)] * 2,
        (evaluator.KEPT, 4),
    ]
    kept = result["memory"][-1]
    assert kept["held_mib"] == pytest.approx(4 * 2 * 64 * 96 * 8 / 2**20, rel=0.1) and kept["areas_mib"] == 0
    first, last = result["memory"][:2]
    assert 0 < first["areas_mib"] < last["areas_mib"] and last["held_mib"] < kept["held_mib"] / 2
    assert result["bootstrap"] == {"images": 30, "classes": 171, "resamples": 20, "seconds": 7.0}
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "evaluator.md").read_text()
    assert cells(printed, evaluator.OBJECTS)[-2:] == ["3.75%", "met (5%)"]
    assert cells(printed, evaluator.NOISE)[-2:] == ["18.75%", "-"]
    with pytest.raises(ValueError, match="--images must rise"):
        call(evaluator, images="9 2")
    with pytest.raises(ValueError, match="--classes must be 12 or more, got 9"):
        call(evaluator, classes="9")


@pytest.mark.parametrize("kind", [evaluator.OBJECTS, evaluator.NOISE])
def test_label_maps_of_the_evaluators_measurement_are_what_they_are_called(kind):
    prediction, label = evaluator.draw_pair(kind, 171, (64, 96), np.random.default_rng(0))
    assert prediction.shape == label.shape == (64, 96)
    assert {prediction.numpy().dtype, label.dtype} == {np.dtype(np.int64)}
    assert 2 < len(np.unique(label)) <= 13 and (label == evaluator.IGNORE).any()
    same = (np.diff(label, axis=1) == 0).mean()
    assert same > 0.6 if kind == evaluator.OBJECTS else same < 0.2


# ------------------------------------------------------------------------------- numbers that are only quoted


def test_the_page_of_the_papers_tables_is_made_of_its_data():
    page = Path(paper_tables.__file__).parents[1] / "docs" / "paper_tables.md"
    assert page.read_text(encoding="utf-8") == paper_tables.text_of({})


def test_quoted_means_are_the_harmonic_means_of_quoted_scores():
    """A wrong digit would show, but for the rounding of the scores. One row is not so in the paper either."""
    checked, unlike = 0, []
    for table in paper_tables.tables():
        for _, _, *scores in table["rows"]:
            if len(scores) == 3 and scores[2] is not None:
                checked += 1
                if abs(scores[2] - 2 * scores[0] * scores[1] / (scores[0] + scores[1])) > 0.16:
                    unlike.append((table["title"][:7], scores))
    assert checked == 12 + 13 + 6 + 6 and unlike == [("Table 1", [33.5, 12.2, 18.2])]


def test_results_of_a_suite_stand_beside_the_papers(call, tmp_path):
    """Both suites have a result on VOC-20."""
    for suite, setting, share in (("a", "gzs3", 0.25), ("b", "ovs", 0.5)):
        scores = dict.fromkeys(("miou_seen", "miou_unseen", "hiou", "miou"), share)
        result = {**scores, "model": "you/mine", "protocol": f"{setting}, transductive", "setting": setting}
        (tmp_path / suite).mkdir()
        (tmp_path / suite / "voc_20.json").write_text(json.dumps({**result, "per_class": {}}))
        (tmp_path / suite / "gzs3.json").write_text("the table of the suite, which is no result")
    pages = []
    for order in ("a b", "b a"):
        folders = " ".join(str(tmp_path / suite) for suite in order.split())
        call(paper_tables, suites=folders, output=tmp_path / "page.md")
        pages.append((tmp_path / "page.md").read_text())
    rows = [line for line in pages[0].splitlines() if line.startswith("| **zs3**")]
    assert pages[0] == pages[1] and rows[0].endswith("|  | not run | not run | not run |")
    assert rows[1] == rows[4] == "| **zs3** | you/mine, gzs3, transductive | 25.0 | 25.0 | 25.0 |"
    assert rows[2].endswith("| you/mine, ovs, transductive | not run | not run | not run | not run | 50.0 |")


def test_the_power_of_the_plan_is_that_of_the_pilots(call, tmp_path):
    call(power, splits="4 12", output=tmp_path / "power.json", picture=tmp_path / "power.png")
    made = json.loads((tmp_path / "power.json").read_text())["contrasts"]
    assert [row["paper"] for row in made] == [-0.9, 8.5, 1.2, 3.8, 8.8, None]
    pilots = [  # hIoU of five seeds, with and without, from the first edition's tables
        [6.0, 6.5, 6.1, 13.3, 26.5],
        [-2.9, -4.7, 8.5, -1.0, -3.5],
        [4.6, -0.2, 4.2, -6.7, -1.1],
        [-10.4, -10.4, -9.7, -1.3, -5.4],
        [7.7, 1.5, 18.8, 5.6, 21.9],
        [2.4, -2.4, -2.4, 6.4, -5.9],
    ]
    for row, pilot in zip(made, pilots, strict=True):
        mean = sum(pilot) / 5
        assert row["deviation"] == pytest.approx((sum((value - mean) ** 2 for value in pilot) / 4) ** 0.5, abs=0.1)
        (strict, loose), fewer = row["found"]["12"], row["found"]["4"]
        assert 0 < loose < strict < fewer[0]
        drawn = loose + row["deviation"] * np.random.default_rng(0).standard_normal((4000, 12))
        assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    assert Image.open(tmp_path / "power.png").width > 500


# ------------------------------------------------------------------------ image labels made from the true ones


def test_shuffled_labels_are_those_of_another_picture():
    truth = np.eye(6, dtype=bool)[np.random.default_rng(0).permutation(6)]  # a label of its own for each picture
    for seed in range(20):
        labels = made_labels.changed(truth, made_labels.MadeLabelArgs(shuffled=True, seed=seed))
        assert sorted(map(tuple, labels)) == sorted(map(tuple, truth)) and not (labels & truth).any()


@pytest.mark.parametrize(("precision", "recall"), [(1, 0.25), (0.5, 0.75), (0.25, 1), (1, 1)])
def test_made_labels_have_the_precision_and_the_recall_that_were_asked_for(precision, recall):
    truth = np.random.default_rng(1).random((400, 8)) < 0.1
    labels = made_labels.changed(truth, made_labels.MadeLabelArgs(precision=precision, recall=recall))
    hits = sum(bool(a and b) for a, b in zip(labels.ravel(), truth.ravel(), strict=True))
    assert hits / truth.sum() == pytest.approx(recall, abs=0.01)
    assert hits / labels.sum() == pytest.approx(precision, abs=0.01)
    with pytest.raises(ValueError, match="--precision 0.01: there are not as many wrong labels to give"):
        made_labels.changed(truth, made_labels.MadeLabelArgs(precision=0.01))


def test_training_reads_made_labels_as_they_were_written(call, tmp_path, capsys):
    write_dataset(tmp_path / "scenes", 30, 1, seed=0)
    call(made_labels, dataset=tmp_path / "scenes", label_space="scenes:2", shuffled="true", output=tmp_path / "labels")
    space = load_label_space("scenes:2")
    records = load_split(tmp_path / "scenes", "train", space)
    given = PseudoLabels(tmp_path / "labels", space, records.image_ids)
    truth = np.zeros((30, len(space.class_names)), dtype=np.int8)
    for index, record in enumerate(records):
        ids = np.setdiff1d(np.unique(record.label), [space.ignore_index])
        truth[index, [number for number in ids if space.class_names[number] in space.unseen]] = 1
    got = np.stack([given(image_id, np.array([]), np.random.default_rng(0)) for image_id in records.image_ids])
    assert sorted(map(bytes, got)) == sorted(map(bytes, truth)) and (got != truth).any()
    assert "precision" in capsys.readouterr().out
    with pytest.raises(ValueError, match="labels exists already"):
        call(made_labels, dataset=tmp_path / "scenes", output=tmp_path / "labels")


# ------------------------------------------------------------------------------------ the power of the plan


@pytest.mark.parametrize(("difference", "deviation", "count", "level"), [(5, 4, 12, 0.05), (2, 4, 4, 0.05 / 6)])
def test_the_power_is_that_of_many_simulated_tests(difference, deviation, count, level):
    drawn = difference + deviation * np.random.default_rng(0).standard_normal((20_000, count))
    found = float(np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < level))
    assert power.power(difference, deviation, count, level) == pytest.approx(found, abs=0.012)


@pytest.mark.parametrize(("difference", "deviation", "level"), [(0, 4, 0.05), (1.2, 3, 0.05), (2, 2, 0.05 / 6)])
def test_the_chance_of_equivalence_is_that_of_many_simulated_tests(difference, deviation, level):
    drawn = difference + deviation * np.random.default_rng(0).standard_normal((20_000, 12))
    above, below = (
        stats.ttest_1samp(drawn, -3, 1, alternative="greater"),
        stats.ttest_1samp(drawn, 3, 1, alternative="less"),
    )
    found = float(np.mean(np.maximum(above.pvalue, below.pvalue) < level))
    assert 0.05 < found < 0.95
    assert power.equivalence_power(difference, deviation, 12, level) == pytest.approx(found, abs=0.012)


# ------------------------------------------------------------------------------------ cells of the photographs


def test_each_picture_is_in_one_fold_of_each_class_split(call, tmp_path):
    names = [*itertools.chain(*photograph_cells.SPLITS), "cow", "tree", "bicycle", "cat", "boat"]
    source = tmp_path / "msrc"
    numbers = iter(range(23))
    for split, count in (("train", 14), ("validation", 9)):
        for kind in ("images", "labels"):
            (source / split / kind).mkdir(parents=True)
        for number in itertools.islice(numbers, count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(source / split / "images" / f"{number}.jpg")
            Image.new("L", (8, 8), number % 20).save(source / split / "labels" / f"{number}.png")
    (source / "classes.json").write_text(json.dumps({"classes": names, "unseen": ["cow"], "ignore_label": 255}))
    call(photograph_cells, dataset=source, output=tmp_path / "cells")
    evaluated = []
    for cell in range(15):
        parts = [load_split(tmp_path / "cells" / str(cell), split) for split in ("train", "validation")]
        ids = [set(part.image_ids) for part in parts]
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 23
        assert parts[0].label_space.unseen == list(photograph_cells.SPLITS[cell // 5])
        for record in parts[1]:
            assert (record.label == int(record.image_id) % 20).all()
        evaluated += sorted(ids[1], key=int)
    for split in range(3):
        assert sorted(evaluated[23 * split : 23 * (split + 1)], key=int) == [str(number) for number in range(23)]
    with pytest.raises(ValueError, match="has no class 'building': the splits are those of MSRC v2"):
        (source / "classes.json").write_text(
            json.dumps({"classes": ["cow", "tree"], "unseen": [], "ignore_label": 255})
        )
        call(photograph_cells, dataset=source, output=tmp_path / "other")
