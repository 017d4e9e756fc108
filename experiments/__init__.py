"""Experiments: training, evaluation, the grid, its budget of FLOPs and its reports."""
