"""Who wrote a table of both roles, and what that did to the loss."""
