"""Text to image."""

from raev2_tasks.t2i.task import TextToImage

TASK = TextToImage()
