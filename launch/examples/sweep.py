"""A Hydra application that trains: a sweeper minimises the last validation loss. See docs/hydra.md."""

import sys

import hydra
from cookbook import from_hydra, train
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")
def main(composed: DictConfig) -> float:
    result = train(from_hydra(composed))
    if result.stopped:  # by Ctrl-C: the run has saved; the sweeper starts no further one
        sys.exit(result.code)
    return result.summary["validation_loss_last"]


if __name__ == "__main__":
    main()
