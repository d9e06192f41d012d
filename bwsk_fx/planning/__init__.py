"""Planning: which values a backward pass keeps, recomputes or inverts."""
