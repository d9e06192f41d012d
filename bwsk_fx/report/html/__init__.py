"""bwsk-fx: a graph as one HTML file."""
