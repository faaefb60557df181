"""The compiled engine: what `Explorer` does with integers and sets, done in arrays by loops that numba compiles.

Nothing here is imported before an exploration is large enough to want it: numpy and numba may not be there.
"""
