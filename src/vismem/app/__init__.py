"""The viewer: what happened in an answer, as data, as HTML fragments and as a web page."""
