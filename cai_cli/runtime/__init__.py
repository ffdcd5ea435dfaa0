"""How a data stage runs: batches, outputs that survive a kill, manifests, summaries."""
