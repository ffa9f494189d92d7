"""RLHF for real, with TRL: supervised fine-tuning, a reward model and PPO on a scenario's own prompts, measured."""
