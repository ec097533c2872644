"""Makes datasets from official archives, and class names from captions."""
