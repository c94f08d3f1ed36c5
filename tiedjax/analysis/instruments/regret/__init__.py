"""What a tie costs each role of the table, in nats a token."""
