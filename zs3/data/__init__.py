"""Reads records and makes batches of them. `samples` ensures that unseen masks never reach training."""

from zs3.data.records import Split, load_split, stream_split
from zs3.data.stored import Record

__all__ = ["Record", "Split", "load_split", "stream_split"]
