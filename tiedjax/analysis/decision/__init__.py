"""The answer page of `tiedjax decide`: verdicts and words, the page, from decision.json and its rungs' results."""
