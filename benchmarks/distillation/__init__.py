"""The study of the two stages of distillation."""
