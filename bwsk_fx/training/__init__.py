"""Training in three modes, from two starts, with comparable results: `train(RunConfig(output=...))`.

The submodules import torch and transformers; they are imported by name where they are needed, so that the command
line can show its help without them.
"""
