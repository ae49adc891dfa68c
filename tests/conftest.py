import torch

# The workers of pytest-xdist share the cores; more threads than cores make every one of them slower.
torch.set_num_threads(1)
