"""Official archives and captions to datasets."""
