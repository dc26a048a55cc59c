"""Inputs and outputs of models: images, prompts, actions, overlays."""
