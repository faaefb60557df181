"""A counterexample for other tools: a mail, a diagram, a trace viewer, a fuzzer, a compiler."""
