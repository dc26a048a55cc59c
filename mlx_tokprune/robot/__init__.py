"""Robot actions: one observation, control loops, action heads, drafts."""
