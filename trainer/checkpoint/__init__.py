"""Checkpoints that survive a kill at any instant and resume under any layout.

    RUN_DIR/checkpoints/
        step-00000100/
            rank-00000-000.safetensors   whole tensors: model/NAME in the master dtype, exp_avg/NAME, ...
                                         frozen/NAME: what gets no gradient and has no optimizer state
            rank-00001-000.safetensors   NAME is the parameter's Hugging Face name, whatever the layout
            state.json                   step, sample position, counters, what the run was (no pickle anywhere)
            tokenizer/                   so that the checkpoint alone is enough to export a model
            manifest.json                written last: size and SHA-256 of each file, tensor -> file
        .step-00000200.partial/          a save that is going on, or was broken off

The tensors are distributed over the ranks by size, and every rank writes its part: the files do not depend on the
layout, which may be another one at each resume.

    files       fsync, SHA-256, writing a file in one piece
    manifest    what a complete checkpoint is, and how a damaged one is found out
    catalog     the checkpoints of a run: the newest good one, which to delete
    tensors     the files of one rank; reading through a memory map
    progress    state.json: where the run stood, and whether this run is the same
    saving      one save: snapshot, write (aside if asked for), commit
    manager     all of these together, as the loop sees them
    foreign/    checkpoints of other trainers: `python -m trainer.checkpoint import`, `train.resume=THEIRS`
    export      `python -m trainer.checkpoint export`: a Hugging Face folder, one tensor at a time
    universal   the same with `--format deepspeed`: optimizer states and step too
"""
