"""Saying what was found: to people (terminal), to programs (json), to test harnesses (ktap), and how long it takes."""
