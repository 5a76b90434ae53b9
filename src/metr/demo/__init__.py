"""Made images for `metr demo`: three small datasets of different fields, and images to try the detector on."""

from metr.demo.datasets import DemoDataset, DemoImage, write_demo_datasets, write_unseen
from metr.demo.run import SceneStatistics, scene_statistics
from metr.demo.scenes import FIELDS, DrawnObject, Field, Scene, draw_scene

__all__ = [
    "FIELDS",
    "DemoDataset",
    "DemoImage",
    "DrawnObject",
    "Field",
    "Scene",
    "SceneStatistics",
    "draw_scene",
    "scene_statistics",
    "write_demo_datasets",
    "write_unseen",
]
