"""Evaluation of students: on answers, and in ranking."""
