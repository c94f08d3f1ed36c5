"""How a table moves through its snapshots."""
