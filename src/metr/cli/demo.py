"""`metr demo`: from nothing to a trained detector in a few minutes."""


def demo() -> None:
    """Draw three datasets, train on them together, evaluate, detect."""
