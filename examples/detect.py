"""Find objects in an image, by the names of training or by any others, from Python."""

import argparse
import sys

from metr import METR
from metr.errors import MetrError


def main() -> None:
    """Prints name, score and box (x1, y1, x2, y2 in pixels) of everything that is found, best first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder, a checkpoint folder, or a name on the hub")
    parser.add_argument("image")
    parser.add_argument("names", nargs="*", help="what to look for; by default everything that was trained")
    given = parser.parse_args()

    model = METR.from_pretrained(given.run)
    found = model.detect(given.image, given.names or None, threshold=0.3)
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        print(f"{found.names[label]} {score:.2f} at {', '.join(f'{corner:.0f}' for corner in box)}")
    print(f"{len(found)} objects, looked for: {', '.join(found.names)}")


if __name__ == "__main__":
    try:
        main()
    except MetrError as error:
        sys.exit(f"error: {error}")
