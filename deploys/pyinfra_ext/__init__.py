"""Extensions of pyinfra: cached facts, keepalive, sudo with a password, run reports."""
