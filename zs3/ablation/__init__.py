"""Ablations: runs the trainings of a table as jobs, and reports them."""
