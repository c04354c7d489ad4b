"""A model behind an interface that many use at once: a thread that owns it, and an OpenAI-compatible server."""
