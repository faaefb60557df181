"""Random inputs to everything that takes any: what comes back is an answer that is documented, and nothing is left behind.

    PYTHONPATH=tests python -m fuzz                     1,000 inputs of each kind
    PYTHONPATH=tests python -m fuzz lines --count 100000
    PYTHONPATH=tests python -m fuzz lines --only 4711   that one again, and what it was

Input number n of a kind is made of random.Random(f"{kind} {n}") alone, so a number is all there is to say of a failure.
"""
