"""bwsk-fx: training."""
