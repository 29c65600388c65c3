"""Ablations: a grid of configs and seeds under equal budgets, and a report that says how sure its findings are."""
