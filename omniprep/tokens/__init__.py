"""Text and placeholders to token ids, labels and TMRoPE positions, together."""
