"""What is said of a study: results, verdicts, claims, sentences, and the report."""
