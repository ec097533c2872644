"""A fingerprint of a split: ids, names, sizes and last bytes of its files. No picture is decoded for it."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configuration_zs3 import Refused, one_line
from files_zs3 import check_regular
from zs3.command_line import InputError, shown

HUB_CARD = ("README.md", ".gitattributes")  # files of a Hub dataset that can change while its data stay the same
ENDS = 1000  # the largest number of files that are read, each only at its end
END_BYTES = 2**16

Row = dict[str, Any]  # "image" and "label": a path, or {"bytes": ..., "path": ...}; "image_id"


def contents_of(
    image_ids: list[str] | None, rows: list[Row] | None, shards: Sequence[Path] | str
) -> dict[str, int | str]:
    """The fingerprint of a split. An unknown fact has no key.

    It has the sizes of all files and the last bytes of up to ENDS files. At its end a JPEG has pixels, a PNG checksums,
    and a table its footer.

    image_ids: None for a streamed table. rows: None for a table. shards: of a table, see `table_files`.
    """
    found: dict[str, int | str] = {}
    if image_ids is not None:
        found |= {"num_images": len(image_ids), "image_ids_sha256": _sha256("\n".join(image_ids))}
    if rows is not None:
        pictures, labels = ([row[name] for row in rows] for name in ("image", "label"))
        found["layout"] = "files"
        found |= {"picture_sizes_sha256": sizes_sha256(pictures), "picture_ends_sha256": _ends_sha256(pictures)}
        found |= {"label_sizes_sha256": sizes_sha256(labels), "label_ends_sha256": _ends_sha256(labels)}
    elif isinstance(shards, str):
        listed = hub_files(shards)
        found["layout"] = "the Hub's"
        found |= {} if listed is None else {"hub_files_sha256": _sha256(str(listed))}
    elif shards:
        found["layout"] = "parquet"
        found |= {"shard_names_sha256": _sha256(str([shard.name for shard in shards]))}
        found |= {"shard_sizes_sha256": sizes_sha256(shards), "shard_ends_sha256": _ends_sha256(shards)}
    return found


def hub_files(repo_id: str) -> list[tuple[str, str]] | None:
    """Names and hashes of a Hub dataset's files, without its card. None: the Hub does not answer.

    It is not tested with the Hub itself.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # httpx's error: its module depends on the version

    try:
        files = HfApi().dataset_info(repo_id, files_metadata=True).siblings
    except (OSError, HTTPError) as error:
        print(f"note: the Hub does not list the files of {repo_id}, so they are not compared ({one_line(error, 80)})")
        return None
    return sorted((file.rfilename, file.blob_id) for file in files if file.rfilename not in HUB_CARD)


def sizes_sha256(files: Sequence[Path]) -> str:
    return _sha256(str([size_of(file) for file in files]))


def size_of(file: Path) -> int:
    """Bytes of a regular file. A pipe, a device or a broken link is an InputError."""
    try:
        return check_regular(file).st_size
    except Refused as error:
        raise InputError(f"cannot read {shown(file)} ({error}): replace it, or remove it with its partner") from error


def _ends_sha256(files: Sequence[Path]) -> str:
    """The digest of the last bytes of up to ENDS files, spread evenly over all."""
    digest = hashlib.sha256()
    for file in files[:: max(math.ceil(len(files) / ENDS), 1)]:
        with file.open("rb") as content:
            content.seek(max(file.stat().st_size - END_BYTES, 0))
            digest.update(content.read())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
