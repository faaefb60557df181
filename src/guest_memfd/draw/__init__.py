"""Pictures of what the explorer has found, in SVG."""
