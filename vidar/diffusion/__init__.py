"""Numbers only: flow matching (flow), training levels (levels) and inference plans (plan)."""
