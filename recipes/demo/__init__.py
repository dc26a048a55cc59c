"""The demo: a small FastVLM that answers questions about drawn scenes."""
