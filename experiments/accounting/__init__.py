"""FLOPs of runs: predicted, reserved and spent; what reports claim."""
