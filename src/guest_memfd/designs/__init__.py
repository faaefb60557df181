"""The designs: what was posted, one file per series, and ours."""
