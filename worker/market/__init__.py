"""A node's part in the prediction market: read the judge's clue, bet, claim."""
