"""What goes into a model and what comes out: images, prompts, actions, overlays."""
