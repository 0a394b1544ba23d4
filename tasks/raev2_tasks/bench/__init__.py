"""`raev2 bench`: what training, sampling, reading and measuring cost on this machine, as one table."""
