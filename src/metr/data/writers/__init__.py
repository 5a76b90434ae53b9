"""One file an annotation format that datasets can be written in."""
