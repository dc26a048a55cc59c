"""Answers in words: streams, memory of pictures, frames of a video, input sizes."""
