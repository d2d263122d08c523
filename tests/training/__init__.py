"""Whole models and the ways to train them: real architectures and trainers, checkpointing, autocast, many processes, GPUs."""
