"""Half-trained checkpoints of other trainers, as checkpoints of this one: weights, moments, step, position.

    python -m trainer.checkpoint import SOURCE TARGET     TARGET is then a checkpoint for train.resume
    train.resume=SOURCE                                   the same, into the run's own folder, under any layout

Each kind of checkpoint is one module, which answers two questions:

    recognises(folder)            whether the folder is of this kind, by the names of its files alone
    open_source(folder, config)   a `source.Source`: tensors by our keys, read one at a time, and a `Record`

    source      what a module answers with, and what it takes from torch's param groups
    table       the kinds, and which of them a folder is
    convert     a checkpoint folder of ours from a source, tensor by tensor
    bring       `train.resume=SOURCE`: convert on one rank, while the others wait
    compare     what the source recorded and the configuration contradicts, one line each
    pickles     pickles are read by a list of the names that they may hold; another name is refused before it runs
    inert       objects of other programs that such a file may hold: stand-ins, which run nothing

    hf_trainer  checkpoint-N of transformers' Trainer
    fsdp        FSDP models, torchtitan's and accelerate's: `dcp` reads the files, `titan` translates names
    deepspeed   `zero` (files by `zero_files`, flat rows by `zero_places`) and `universal`

What is the same as in the source: weights and moments (float32), the optimizer's number of updates, the step, a loss
scale. What the source did not record is not compared, and its random numbers and order of data are its own.
"""
