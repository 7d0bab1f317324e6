"""Budgets: costs of a shape, targets, and sizes that meet them."""
