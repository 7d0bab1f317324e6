"""How much to remove where: costs, targets, and sizes that meet them."""
