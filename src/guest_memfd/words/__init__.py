"""The vocabulary that all share: primitives, outcomes, facts, page states, scenes. It imports nothing but errors."""
