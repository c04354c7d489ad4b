"""The viewer: what happened in an answer, as data, as HTML and as a page in the browser."""
