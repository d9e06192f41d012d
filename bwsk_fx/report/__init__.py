"""bwsk-fx: report."""
