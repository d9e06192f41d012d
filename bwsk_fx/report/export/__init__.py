"""Typed graphs for other tools: networkx and GraphML, Model Explorer, DOT and SVG."""
