"""Answers in words: streams, memory of pictures, frames of a video, input sizes."""

from .chat import Answer, Chat
from .memory import Memory
from .stream import generate, stream_generate
from .temporal import Temporal

__all__ = ["Answer", "Chat", "Memory", "Temporal", "generate", "stream_generate"]
