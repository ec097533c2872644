"""The suite runs offline and keeps its copies of remote code to itself. Set before transformers is imported."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="zs3_modules_")
