"""Judging: a feedback model compares two replies under principles (paper section 4.1)."""
