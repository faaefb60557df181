"""The explorer: programs, places, tables, search."""
