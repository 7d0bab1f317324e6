"""How every command behaves: what it shows, how it writes results, which numbers it takes, what it downloads."""
