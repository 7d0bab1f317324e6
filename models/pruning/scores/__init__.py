"""Importance scores of units, and the removal order that follows."""
