"""Reading: finished answers read in one pass with their memories in place, the counterpart of decoding."""
