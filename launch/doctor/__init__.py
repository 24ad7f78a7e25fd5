"""`cookbook doctor`: the machine's capabilities, and what each layout lacks here.

software   packages and their versions, against what this project was tested with
machine    devices, communication, compilers, shared memory, limits, disk, Slurm
layouts    each option of the group `parallel`, planned and checked as a run would be
"""
