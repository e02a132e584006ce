"""Discovery of peers: DHT, greetings and the peer table."""
