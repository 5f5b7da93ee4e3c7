"""Federated fine-tuning with low-rank adapters of different ranks (PreLort)."""
