"""Phase 2 (paper section 4): AI preference labels, the preference model, RL against it."""
