"""Audits: one file, one audit; `mithridate list audits` shows them."""
