"""The shape of a table's spectrum, and how alike two tables' spaces are."""
