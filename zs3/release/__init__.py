"""Prepares a checkpoint for the Hub."""
