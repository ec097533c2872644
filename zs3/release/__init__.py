"""A checkpoint to a folder for the Hub."""
