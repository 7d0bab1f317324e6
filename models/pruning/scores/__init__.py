"""What each unit is worth, and in which order units would go."""
