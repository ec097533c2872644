"""Scores of label maps: confusion, means, intervals, calibration."""
