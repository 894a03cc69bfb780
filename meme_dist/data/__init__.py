"""Rows to tar shards, and tar shards to batches."""
