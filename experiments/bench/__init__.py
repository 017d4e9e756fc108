"""The `bench` verb: every job beside transformers + PEFT, calibrated, checked and put into a table, in one run.

Each measurement is a fresh process with pinned threads; ours and the peer's take turns, so that both meet the same
machine. Floors come from a product rate and a read bandwidth that are measured in between. Nothing is printed of a
case whose two sides did not compute the same.

`session` runs it, `cases` are its lines and their targets, `floors` what they need at least, `sides` what a fresh
process does, by `ours` or `peer`; `compare` and `table` make lines of measurements, `scaling` sweeps the sizes.
"""
# Nothing is imported here: it would count as memory of every fresh process.
