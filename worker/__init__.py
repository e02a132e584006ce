"""hivewright's worker: trains a language model in a swarm, and hosts the swarm's other roles."""

__version__ = "0.1.0"
