"""The hardware: memory and its allocator; the architecture."""
