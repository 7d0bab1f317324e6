"""What a run will need, said beforehand: memory per GPU by part, hours by phase, and what a budget is best spent on."""
