"""bwsk-fx: rules."""
