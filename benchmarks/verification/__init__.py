"""Verification, verified."""
