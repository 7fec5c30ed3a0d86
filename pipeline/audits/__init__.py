"""Audits: one file, one audit. None yet: `mithridate list audits` says so."""
