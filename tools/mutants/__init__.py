"""Mutants: the library with one small thing wrong, and whether the explorer notices.

A mutant that nothing kills is a hole in the laws or in the scenarios, or it is equivalent and says why.

    targets.py      which files are changed, and what is to notice
    site.py         the functions and values in a file, and what in them is left alone
    operators/      what can go wrong, by subject; vocabulary.py: the words that can be taken for one another
    change.py       one change of a syntax tree
    mutant.py       all changes of all sites, with names that last
    apply.py        a mutant takes the place of the code it was made of
    explore.py      the scenarios that have to notice: the only file that knows the suite
    tested.py       tests of the project that have to notice what the suite does not
    killer.py       what scenarios are, whatever they do
    baseline.py     what runs where, and what it costs
    run.py          all of them, in processes; trial.py: one mutant against its scenarios
    watch.py        when a trial has taken too long, or goes round without end
    children.py     trials in processes of their own, with limits
    equivalent.py   the list of those that cannot be noticed (equivalent.txt)
    report.py       tables
    cli.py          `make mutants`
"""
