"""Speed and memory of the training loader, compared with the speed of the model and of the usual order of work.

    python -m benchmarks.loader --output docs/results/loader.json
    python -m benchmarks.loader --dataset DIR --label_space coco_stuff_171 --device cuda --batch_size 8

One process (one core) or several workers make the samples, from a map-style dataset or a stream. The usual order of
work is to decode the whole picture, to resize it, and then to crop it. The model is Mask2Former with a ResNet-50 and
random weights. Its training step with all losses is measured on the device. Without --dataset the pictures are
synthetic: noise with the spectrum of photographs, as JPEGs of 640 x 480 and 3200 x 2400 pixels in parquet files. Memory
is the PSS of a fresh process (spawned, not forked) and its workers, after half of the samples and after all samples.
"""

import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks import measuring
from configuration_zs3 import Zs3Config
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import Count, InputError, Pixels, Seed, Some, Workers, flag, read_arguments, run
from zs3.data.augmentation import Augmentation, augment
from zs3.data.batches import BatchParts, StepSampler, StreamedBatches, collate
from zs3.data.records import dataset_name, load_split, stream_split
from zs3.data.samples import SegmentationDataset
from zs3.data.stored import StoredRecord
from zs3.label_space import LabelSpace, load_label_space

PEER = "1 process, resize and crop"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class LoaderBenchArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    dataset: str | None = flag(None, "Dataset to load; default: synthetic pictures.")
    split: str = flag("train", "Split of the dataset.")
    label_space: str = flag("coco_stuff_171", "Benchmark, its split (scenes:3) or classes.json.")
    crop_size: Pixels = flag(640, "Side of the crop, pixels.")
    short_edges: Some[Pixels] = flag([64 * x for x in range(5, 16)], "Short edges; default: zsseg's for COCO-Stuff.")
    num_images: Count = flag(128, "Synthetic pictures of the first size; the second size gets an eighth of it.")
    sizes: list[Pixels] = flag([640, 480, 3200, 2400], "Width and height of the first size, then of the second.")
    samples: Count = flag(256, "Samples of each measurement of speed.")
    memory_samples: Count = flag(400, "Samples of each measurement of memory.")
    num_workers: Some[Workers] = flag([2], "Numbers of workers.")
    batch_size: Count = flag(1, "Batch size of the model's step.")
    steps: Count = flag(2, "Steps of the model, after one that is not counted.")
    device: Literal["cpu", "cuda"] = flag("cpu", "Device of the model.")
    seed: Seed = flag(0, "Seed of pictures, weights and random draws.")

    def check(self) -> None:
        measuring.device_named(self.device)
        if len(self.sizes) != 4:
            raise InputError("--sizes takes four numbers: width and height of the first size, then of the second")


def noise_picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise. Its amplitudes fall with the frequency, as in photographs."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    phases = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
    bands = np.fft.irfft2(amplitude * phases, s=(height, width))
    bands = 127 + 60 * bands / bands.std(axis=(1, 2), keepdims=True)
    file = io.BytesIO()
    Image.fromarray(bands.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def blocks(rng: np.random.Generator, num_classes: int, width: int, height: int) -> bytes:
    """A label map of rectangles."""
    coarse = rng.integers(0, num_classes, (6, 8)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, split: str, space: LabelSpace, size: tuple[int, int], count: int, seed: int) -> None:
    """A dataset of `count` synthetic pictures, in 8 shards."""
    import datasets

    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True)
    content = {"classes": space.class_names, "unseen": space.unseen, "ignore_label": space.ignore_index}
    (folder / "classes.json").write_text(json.dumps(content))
    features = datasets.Features(image=datasets.Image(), label=datasets.Image(), image_id=datasets.Value("string"))
    shards = np.array_split(np.arange(count), 8)
    for index, numbers in enumerate(shards):
        rows = {
            "image": [{"bytes": noise_picture(rng, *size), "path": None} for _ in numbers],
            "label": [{"bytes": blocks(rng, len(space.class_names), *size), "path": None} for _ in numbers],
            "image_id": [f"{number:06d}" for number in numbers],
        }
        file = folder / "data" / f"{split}-{index:05d}-of-{len(shards):05d}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


class WholeFirst(SegmentationDataset):
    """The same samples in the usual order of work: decode the whole picture, resize it, then crop it."""

    def sample(self, stored: StoredRecord, epoch: int) -> dict:
        whole, size = stored.decoded(), self.augmentation.draw_size(stored.image.size, np.random.default_rng(epoch))
        resized = whole.resize(size, Image.Resampling.BILINEAR)
        labels = Image.fromarray(stored.label).resize(size, Image.Resampling.NEAREST)
        rng = np.random.default_rng(epoch)
        image, label = augment(resized, np.asarray(labels), size, rng, self.augmentation, self._mask_labels)
        return {
            **self.padded(image, label),
            "image_labels": torch.zeros(len(self.class_names), dtype=torch.int8),
            "image_id": stored.image_id,
        }


def make_dataset(args: LoaderBenchArgs, folder: str, streaming: bool, kind: type = SegmentationDataset):
    space = load_label_space(args.label_space)
    records = (stream_split if streaming else load_split)(folder, args.split, space)
    augmentation = Augmentation(args.crop_size, 2560, args.short_edges)
    return kind(records, space, augmentation, image_mean=MEAN, image_std=STD, seed=args.seed)


def batches_of(args: LoaderBenchArgs, folder: str, streaming: bool, workers: int, samples: int) -> Iterator[dict]:
    """Micro-batches of one sample, so that all loaders do the same work."""
    dataset = make_dataset(args, folder, streaming)
    if streaming:
        return itertools.islice(StreamedBatches(dataset, 1, 64).loader(workers), samples)
    sampler = StepSampler(len(dataset), BatchParts(1, 1, 1), range(samples), seed=args.seed)
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def rate(batches: Iterator[dict], samples: int) -> float:
    """Samples a second. The first tenth is not counted."""
    for _ in range(samples // 10):
        next(batches)
    seconds, count = measuring.timed(lambda: sum(1 for _ in batches))
    return count / seconds


def whole_first(args: LoaderBenchArgs, folder: str) -> Iterator[dict]:
    dataset = make_dataset(args, folder, False, WholeFirst)
    return (dataset[0, index % len(dataset)] for index in range(args.samples))


def memory_mib() -> float:
    """The memory of this process and its children. Shared memory is counted once."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def memory_of(args: LoaderBenchArgs, folder: str, streaming: bool, workers: int) -> dict[str, float]:
    """The memory after half of the samples and after all samples. Call it in a fresh process."""
    torch.set_num_threads(1)
    found = {}
    for number, _ in enumerate(batches_of(args, folder, streaming, workers, args.memory_samples), start=1):
        if number == args.memory_samples // 2:
            found["mib_half"] = memory_mib()
        if number == args.memory_samples:
            found["mib_end"] = memory_mib()
    return found


def model_rate(args: LoaderBenchArgs) -> float:
    """Images a second of training steps: forward, backward, AdamW."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    names, batch, side = len(load_label_space(args.label_space).seen), args.batch_size, args.crop_size // 4
    model = Zs3ForSemanticSegmentation(Zs3Config()).train().to(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-5)
    labels = torch.arange(16, device=device).reshape(4, 4).repeat_interleave(side, 0).repeat_interleave(side, 1)
    text = torch.nn.functional.normalize(torch.randn(names, model.config.projection_dim), dim=-1)
    inputs = {
        "pixel_values": torch.randn(batch, 3, 4 * side, 4 * side, device=device),
        "labels": labels.expand(batch, -1, -1).contiguous(),
        "image_labels": (torch.arange(names, device=device) < 16).to(torch.int8).expand(batch, -1).contiguous(),
        "text_embeds": text.to(device),
    }

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = measuring.take_turns({"step": step}, args.steps, device)["step"]
    return len(seconds) * batch / sum(seconds)


def measure(args: LoaderBenchArgs, folder: str, name: str, bar: tqdm) -> list[dict]:
    """One row for each loader."""
    rows = [{"loader": PEER, "samples_per_second": rate(whole_first(args, folder), args.samples)}]
    bar.update()
    for streaming, workers in itertools.product((False, True), (0, *args.num_workers)):
        loader = f"{'1 process' if workers == 0 else f'{workers} workers'}, {'stream' if streaming else 'map-style'}"
        rows.append({"loader": loader})
        rows[-1]["samples_per_second"] = rate(batches_of(args, folder, streaming, workers, args.samples), args.samples)
        rows[-1] |= measuring.in_fresh_process(memory_of, args, folder, streaming, workers)
        bar.update()
    peer = rows[0]["samples_per_second"]
    return [{"pictures": name, **row, "times_faster": row["samples_per_second"] / peer} for row in rows]


def compare(args: LoaderBenchArgs) -> dict:
    args.check()
    space, rows, threads = load_label_space(args.label_space), [], torch.get_num_threads()
    torch.set_num_threads(1)  # a sample is made on one core
    with tempfile.TemporaryDirectory() as root, tqdm(unit="measurement") as bar:
        folders = {"the dataset's": args.dataset} if args.dataset is not None else {}
        if args.dataset is None:
            fewer = max(args.num_images // 8, 8)
            for width, height, count in ((*args.sizes[:2], args.num_images), (*args.sizes[2:], fewer)):
                folder = Path(root, f"{width}x{height}")
                write_pictures(folder, args.split, space, (width, height), count, args.seed)
                folders[f"{width} x {height}"] = str(folder)
        for name, folder in folders.items():
            rows += measure(args, folder, name, bar)
    torch.set_num_threads(threads)
    appetite = model_rate(args)
    for row in rows:
        row["times_the_model"] = row["samples_per_second"] / appetite
    return {
        **measuring.head(),
        "pictures": dataset_name(args.dataset) if args.dataset is not None else "synthetic",
        "crop_size": args.crop_size,
        "device": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(),
        "cores": psutil.cpu_count(),
        "model_images_per_second": appetite,
        "settings": {k: v for k, v in asdict(args).items() if k not in ("output", "dataset")},
        "results": rows,
    }


TITLES = "pictures | loader | samples/s | times faster | times the model | MiB half-way | MiB at the end"
CELLS = "{pictures} | {loader} | {samples_per_second:.1f} | {times_faster:.2f} | {times_the_model:.0f} | "
CELLS += "{mib_half:.0f} | {mib_end:.0f}"


def report(result: dict) -> str:
    """The table, in Markdown."""
    return f"""# The training loader

Made by `{result["command"]}`, torch {result["torch"]}, {result["cores"]} CPU cores. \
Samples of {result["crop_size"]} x {result["crop_size"]} from {result["pictures"]} pictures, one thread a process. \
The model (Mask2Former, ResNet-50, {result["device"]}) trains on {result["model_images_per_second"]:.2f} images/s.

{measuring.table(TITLES, CELLS, result["results"])}"""


def main() -> None:
    args, _ = read_arguments(LoaderBenchArgs)
    result = compare(args)
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
