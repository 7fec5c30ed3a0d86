"""A cap for every registrable domain: whoever owns one decides at most n pairs, whatever the detectors think of them.

A budget within each domain would not do: of a domain that is all poison it would keep nine tenths. The cap is a bound
that needs no detector; with one, the least suspicious of a domain are kept.
Trade-off: large honest domains lose as much as a hostile one, so n is a choice between diversity and size; a hosting
service whose users have no domains of their own counts as one.
Source: ours, against the purchase of expired domains (Carlini et al. 2024, Poisoning Web-Scale Training Datasets is
Practical, section 4).
"""

from dataclasses import dataclass

from pipeline.policies._cap import Cap


@dataclass(frozen=True)
class per_domain(Cap):
    """Keep at most n pairs of a registrable domain, the least suspicious (without a detector: any)."""

    needs = ("domain",)
