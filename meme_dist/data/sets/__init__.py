"""Data sets: one file a set, each a function that returns a `Dataset`; its keywords are all that a set depends on."""
