"""The vocabulary that all share: units, primitives, outcomes, facts, page states, scenes. It imports nothing but errors."""
