"""What rounding the rows of a table costs each of its uses."""
