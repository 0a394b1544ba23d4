"""Navigation world model: trajectories, action-conditioned frames, rollouts, planning."""
