"""The vocabulary that all share: primitives, outcomes, facts, scenes. It imports nothing but errors."""
