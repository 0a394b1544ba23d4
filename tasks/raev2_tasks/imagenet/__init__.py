"""Class to image."""

from raev2_tasks.imagenet.task import ClassToImage

TASK = ClassToImage()
