"""Writing with memory: the row-queue decoder, invocation policies, and the record of what happened."""
