"""Row types, the formats that users bring, and reading and writing JSONL."""
