"""Statistics of rows, labels, replies and models, each with its interval."""
