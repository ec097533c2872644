"""Ablations: tables of trainings as jobs, run and reported."""
