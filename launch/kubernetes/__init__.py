"""Runs on Kubernetes: a JobSet made from the plan, and the command that each of its pods starts.

options    whether the configuration can be a JobSet: names, sizes, places
manifest   from the plan to the JobSet, a dictionary
kubectl    the rights, the volume and the submission, asked through kubectl
submit     the entry point's part: check, print or submit
node       in each pod: the launcher of that node's ranks
"""
