"""Facts about datasets and embeddings of names as tests want them, and datasets on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from metr.inspection import InspectionConfig
from metr.inspection.facts import DatasetFacts, NameFacts
from metr.text.encoder import TextEncoderConfig
from metr.text.similar_names import EmbeddingSimilarity

# A text encoder that there is not: names are compared by spelling, and no language model is loaded.
SPELLING = InspectionConfig(text=TextEncoderConfig(source="bundled:none"))


def name_facts(name: str, boxes: int = 10, *, side: float = 0.2, annotated: float = 1) -> NameFacts:
    return NameFacts(
        name=name,
        boxes={"train": boxes},
        side=float(side) if boxes else None,
        annotated=float(annotated),
    )


def dataset_facts(name: str, names: Sequence[str | NameFacts], shown: Sequence[Sequence[str]] = ()) -> DatasetFacts:
    """`shown` are the names in each image."""
    facts = {one.name: one for one in (name_facts(one) if isinstance(one, str) else one for one in names)}
    rows = [(image, list(facts).index(one)) for image, inside in enumerate(shown) for one in inside]
    return DatasetFacts(
        name=name,
        format="made",
        images={"train": len(shown)},
        empty=0,
        ignored=0,
        names=facts,
        sizes=None,
        looked_at=len(shown),
        shown=np.array(rows, dtype=np.int64).reshape(-1, 2),
    )


def embeddings(vectors: Mapping[str, Sequence[float]]) -> EmbeddingSimilarity:
    """Directions that stand for embeddings."""
    table = normalize(torch.tensor([list(vector) for vector in vectors.values()], dtype=torch.float32), dim=-1)
    return EmbeddingSimilarity(source="made", names=tuple(vectors), vectors=table)


def save_noise(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """An image (width, height) that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_csv(root: Path, splits: Mapping[str, Sequence[str]]) -> Path:
    """A dataset of lines `image,x1,y1,x2,y2,name` for each split; images that are missing are made, 40 x 30."""
    for split, lines in splits.items():
        for name in (line.split(",")[0] for line in lines):
            path = root / "images" / name
            if not path.exists():
                save_noise(path, seed=sum(str(path).encode()))
        (root / f"{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    return root
