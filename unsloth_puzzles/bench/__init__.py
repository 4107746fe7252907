"""Measuring: what the machine is, how long and how much memory a call takes, what a kernel compiles to.

hardware, ceilings            the machine, and how fast it can go
timing, memory, samplers      seconds and bytes of a call
compilations, cross_compile   what torch.compile does in a block, what Triton makes for another GPU
t4                            a T4's limits and datasheet, for predictions
record, code_digest           measurements as JSON, and of which code they are
section, experiments, child   parts of the notebook, errors that do not end it, processes of their own
challenges, criterion, rubric, scorecard   the puzzles' points, from the records
markdown, text                tables, and a text to train on
"""
