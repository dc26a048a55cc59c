"""Generated pictures, the questions about them, and the right answers."""
