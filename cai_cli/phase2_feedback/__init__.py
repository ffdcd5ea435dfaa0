"""Phase 2 (paper section 4): label preferences, train a preference model, and train a policy against it by RL."""
