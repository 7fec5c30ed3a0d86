"""A cap for every caption: an attack that says the same many times is cut to n, a rare concept is not touched.

Trade-off: an attacker who varies the words escapes; captions that are file names or "image" lose, which few will miss.
Source: ours; web-scale sets are deduplicated likewise (e.g. Xu et al. 2024, MetaCLIP, caps matches of an entry).
"""

from dataclasses import dataclass

from pipeline.policies._cap import Cap


@dataclass(frozen=True)
class caption_cap(Cap):
    """Keep at most n pairs of the very same caption, the least suspicious (without a detector: any)."""

    needs = ("caption",)
