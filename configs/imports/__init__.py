"""Configurations of other trainers, translated: each field of a file is translated, harmless to drop, or lost.

    fields.py     a field, and how the table (`configs/foreign.yaml`) translates it
    NAME.py       one format each: how a file is recognised, and the fields that need more than the table
    pickled.py    `training_args.bin`, read without executing it
    reading.py    files, and the files that they name, as sources
    combine.py    all fields of all files as one set of our keys
    write.py      an experiment file, and the lists that a person reads

Libraries of other trainers are not imported: a translation takes a moment and needs no torch.
"""
