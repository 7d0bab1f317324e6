"""How good a student is: on answers, and on ranks."""
