"""Where samples come from: folders, tables, tar shards, and texts."""
