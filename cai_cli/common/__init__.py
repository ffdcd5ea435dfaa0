"""What every layer uses: errors, messages on stderr, YAML, seeds, hash tables."""
