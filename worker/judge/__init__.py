"""The judge: it runs the prediction market's games and asks evaluation questions."""
