"""The smallest training run: its recipe, its data and its flags."""

from pathlib import Path

import numpy as np
import yaml

from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES

RECIPE = {
    "hidden_dim": 32,
    "feature_size": 32,
    "mask_feature_size": 32,
    "num_queries": 8,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "num_attention_heads": 2,
    "dim_feedforward": 32,
    "encoder_feedforward_dim": 32,
    "train_num_points": 64,
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "embedding_size": 8,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "batch_size": 2,
    "crop_size": 64,
    "max_size": 96,
    "test_short_edge": 64,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "backbone_norm": "batch",
    "logging_steps": 2,
    "max_steps": 4,
}


def write_data(folder: Path) -> Path:
    """Writes a dataset, its text vectors and the recipe into one folder. Returns the folder of the dataset."""
    write_dataset(folder / "scenes", num_train=6, num_validation=3, seed=0)
    rng = np.random.default_rng(0)
    np.save(folder / "text.npy", rng.normal(size=(len(CLASS_NAMES), 12)).astype(np.float32))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder / "scenes"


def flags(data: Path, output_dir: Path, **overrides) -> list[str]:
    values = {
        "config": data.parent / "recipe.yaml",
        "dataset": data,
        "output_dir": output_dir,
        "text_embeds": data.parent / "text.npy",
        **overrides,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
