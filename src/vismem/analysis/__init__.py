"""Analysis: what each memory attends to, what attends to it, and how replacing it changes the next tokens."""
