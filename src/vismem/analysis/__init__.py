"""Analysis: where memory looks, what reads it, and what would have been written without it."""
