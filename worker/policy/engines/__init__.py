"""Generation engines and decoders."""
