"""Checkpoint folders on disk: config.json, weight files."""
