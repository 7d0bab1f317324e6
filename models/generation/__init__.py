"""Answers of the student's own: decoding, sampling, rollouts, and which steps learn from them."""
