"""Generation: the protocol that trainers see, and the engines behind it."""
