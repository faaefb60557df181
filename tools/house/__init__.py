"""The house in numbers: how the code is cut, what its names and words are like, and how far one lend travels."""
