"""Runs on Ray: a placement group with one bundle per node, an actor in each bundle, and under it the launcher of that
node's ranks.

options    whether the configuration can run on Ray: names, addresses, places
cluster    the connection, what the cluster has, and the placement group
record     what the run folder says about the run on Ray
node       the actor: one node's launcher, its output and its end
start      one start of all nodes' ranks, to its end
submit     the entry point's part: check, print or run, and how a run stands
"""
