"""Export: a METR as a file that runs without METR and without torch."""
