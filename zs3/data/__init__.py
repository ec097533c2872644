"""Records in, batches out. The rule that unseen masks never reach a training lives in `samples`."""

from zs3.data.records import Split, load_split, stream_split
from zs3.data.stored import Record

__all__ = ["Record", "Split", "load_split", "stream_split"]
