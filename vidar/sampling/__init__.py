"""From plans to video: solvers, guidance, noise, the tick and the rollout."""
