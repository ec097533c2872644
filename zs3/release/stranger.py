"""Acts as a user with transformers but without this project: loads a released folder and segments a picture.

    python -I stranger.py FOLDER LABEL LABEL

`zs3 release` runs it as a process. It imports nothing from the project, and blocks such imports in other modules.
"""

import sys


class NotInstalled:
    """Hides the project's modules, even if the project is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        top = name.partition(".")[0]
        if top == "zs3" or top.endswith("_zs3"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def visit(folder: str, labels: list[str]) -> str:
    """Loads and uses the model. Returns a line about it; raises an error if anything fails."""
    from PIL import Image
    from transformers import AutoModel, AutoProcessor, pipeline

    model, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    lost = sorted(loading["missing_keys"] | loading["unexpected_keys"])
    if lost:
        raise ValueError(f"{lost[0]} and {len(lost) - 1} other weights do not fit the configuration")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are no finite numbers")
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    segmentation = pipeline(model=folder, trust_remote_code=True)(image, candidate_labels=labels, output="map")[
        "segmentation"
    ]
    if segmentation.shape != (64, 96) or not 0 <= segmentation.min() <= segmentation.max() < len(labels):
        raise ValueError(f"a picture of 64 x 96 pixels became a label map {segmentation.shape} of other ids")
    return f"{type(model).__name__}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled)
    print(visit(sys.argv[1], sys.argv[2:]))
