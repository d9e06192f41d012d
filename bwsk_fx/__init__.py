"""bwsk-fx."""
