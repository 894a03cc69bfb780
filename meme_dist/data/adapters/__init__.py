"""Data of other libraries as a `Dataset`, ready for `write_shards`: one file for each library, none of which is a dependency."""
