"""A feedback model that compares two replies under principles."""
