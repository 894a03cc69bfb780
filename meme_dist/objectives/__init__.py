"""Objectives: one file each. An objective owns every trainable parameter and is what gets wrapped and called."""
