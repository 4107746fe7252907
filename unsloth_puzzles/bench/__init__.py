"""Measuring: what the machine is, how long and how much memory a call takes, what a kernel compiles to.

A module per question: ``hardware`` (the machine) and ``ceilings`` (how fast it can go), ``timing``, ``memory``,
``cross_compile``, ``compilations`` (what torch.compile does in a block), ``section`` (time and peak of a part of
the notebook), ``record`` (the JSON that every published figure comes from), ``code_digest`` (of which code it is).
Nothing here knows what is measured.
"""
