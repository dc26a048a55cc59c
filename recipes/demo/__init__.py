"""Training of the demo: a small FastVLM for questions about drawn scenes."""
