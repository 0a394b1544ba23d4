"""Tar shards of captioned pictures: read, check, index, stream."""
