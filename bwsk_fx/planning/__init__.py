"""bwsk-fx: planning."""
