"""Reading traces: what was in them, as numbers, texts and pictures."""
