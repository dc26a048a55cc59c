"""Model families, and what they share: towers, language model and cache."""
