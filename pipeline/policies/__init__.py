"""Policies: one file, one way to turn scores into decisions.

A policy is a frozen dataclass with `detectors`, whose scores it reads, and, where it looks at what pairs have in
common, `needs`, the groups (pipeline/scored.py). `fit(passes)` learns from all shards what it must, each call of
`passes` yielding their scores anew; `drops(scores, fitted)` then says of one shard's pairs, bool[n], which are to go.
Combinations have `parts`, and what these have learnt in the same order.
"""
