"""Phase 1 (paper section 3): generate prompts, sample replies, critique, revise and fine-tune."""
