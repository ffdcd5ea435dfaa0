"""Model directories: names, fetching, loading, content hashes."""
