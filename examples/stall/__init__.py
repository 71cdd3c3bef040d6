"""The pieces of examples/why_td_stalls.py: the ground, optimisers, the linear theory, the list of runs, figures."""
