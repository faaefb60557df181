"""Pages for a browser, one self-contained file each: a counterexample, a comparison, a survey of kernels."""
