"""For those who test a VMM: hosts with one interface, emulated and real, and a pytest plugin that hands them out.

    hosts.py     the hosts, what each can do, and what it finds left behind
    plugin.py    the fixture `gmem_host`, the marker `gmem`, the options

docs/testing.md is the manual.
"""
