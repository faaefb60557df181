"""The assembler for A64."""
