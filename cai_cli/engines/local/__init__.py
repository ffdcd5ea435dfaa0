"""The local engine: continuous batching and shared-prefix caching on torch."""
