"""One training run: its flags, its start, its processes, its data, its folder."""
