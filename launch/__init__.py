"""The door for people: `python -m launch` starts the ranks of a run on this machine.

`command` builds the words of each launcher, `process` runs them, `__main__` is the door.
"""
