"""What this kernel's guest_memfd and memfd_secret offer, how they behave, and which known bugs they have.

    ask/       how a question is put
    rows/      the behaviour table
    survey.py  all questions, one after the other; against.py: two answers compared
    offers.py  capabilities, limits, parameters: what rows depend on
    bugs.py    known bugs, and how each shows itself from user space
    left.py    what a run leaves behind
    report.py  all of it as text, JSON and KTAP

Rule of this package: the process that asks never touches /dev/kvm itself for longer than a question; whatever can hang,
crash or leak does so in a child.
"""
