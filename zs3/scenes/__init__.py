"""The embedded benchmark `scenes`: its world, its tiny encoders, and the demo."""

from zs3.scenes.render import CLASS_NAMES, IGNORE_INDEX, UNSEEN, render_scene

__all__ = ["CLASS_NAMES", "IGNORE_INDEX", "UNSEEN", "render_scene"]
