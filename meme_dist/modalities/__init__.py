"""Kinds of observation, one file each: functions that return a `Modality`."""
