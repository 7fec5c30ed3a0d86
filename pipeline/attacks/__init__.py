"""Attacks: one file, one attack. See CONTRIBUTING.md for the contract."""
