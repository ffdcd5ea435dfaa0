"""Phase 1 (paper section 3): sample, critique, revise, fine-tune."""
