"""Navigation world model."""

from raev2_tasks.nwm.task import NavigationWorldModel

TASK = NavigationWorldModel()
