"""An OpenAI-compatible server, and the worker thread that owns its model."""
