"""Exploring designs: the engines, the suite of scenarios, traces and their replay."""
