"""Label maps to numbers: confusion, means, intervals, calibration."""
