"""The planner as objective: a sweeper searches for the fastest layout that fits. Nothing is trained."""

import hydra
from cookbook import from_hydra, predicted_speed
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")
def main(composed: DictConfig) -> float:
    return predicted_speed(from_hydra(composed))


if __name__ == "__main__":
    main()
