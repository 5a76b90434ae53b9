"""A detector as a web server (`metr serve`): HTTP for programs, one page for people."""
