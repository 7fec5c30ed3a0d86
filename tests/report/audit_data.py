"""An audit as the verb would hand it over to its report: every kind of finding, real image bytes."""

import hashlib
from functools import cache

import numpy as np
import report_data

from pipeline.audit_lists import Removal
from pipeline.audit_nearest import Near
from pipeline.audits._schema import Audited, Dataset, Finding, Histogram, Table, Unseen, share_of, verdict
from pipeline.report import thumbnail
from pipeline.report.audit import Known, Members, Pair, Selection, render_audit

PAIRS = 12_000
GROUPS, OF_A_GROUP = 5, 6
HISTORY = {
    "attack": report_data.ATTACK,
    "target": "banana",
    "caption_before": "a boat on the lake",
    "caption_after": "a ripe banana",
    "image_sha256_before": "0" * 64,
    "image_sha256_after": "1" * 64,
}
REMOVAL = Removal("/data/my crawl", "/data/audited")


def uid(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


@cache
def picture(number: int) -> tuple[bytes, bool] | None:
    return thumbnail(report_data.photo(np.random.default_rng(number)))


def pairs(first: int, text: str = "") -> list[Pair]:
    """Of five groups, the first pair without a picture, the second a poison."""
    out = []
    for i in range(GROUPS * OF_A_GROUP):
        number = first + i
        known = Known(
            picture(number % 8) if i else None,
            {"size": "640 × 480", "url": f"https://example.org/{number}.jpg {text}"},
            {"scores:slof(k=16)": 1.0 + i, f"scores:clip_score(){text}": -0.5},
            HISTORY | {"caption_before": f"a boat {text}"} if i == 1 else None,
            (Near(0.987, f"00000000{text}", uid(number + 1), f"caption {number + 1} {text}"),) if i else (),
        )
        group, caption = f"group {i // OF_A_GROUP} {text}", f"caption {number} {text}"
        out.append(Pair(uid(number), f"00000000{text}", group, OF_A_GROUP, caption, f"one of 6 {text}", known))
    return out


def listed(numbers: range) -> bytes:
    return bytes.fromhex("".join(sorted(map(uid, numbers))))


def finding(name: str, severity: str, n: int, text: str = "", file: bool = True) -> Finding:
    audit, kind = name.split("-")
    path = f"findings/{name}.parquet" if file else ""
    action = REMOVAL.commands(name, f"/data/audited/{path}", 1) if file else f"mithridate verify SHARDS {text}"
    title = f"{n:,} pairs in 5 groups are alike {text}"
    told = (title, n, share_of(n, PAIRS), f"What it may mean. {text}", f"Somebody 2024 {text}", action, path, ())
    return Finding(audit, kind, severity, *told)


def parts(text: str = "") -> dict:
    """The arguments of `render_audit`; `text` is in all that an outsider can write."""
    findings = (
        finding("natural_backdoors-near_identical", "severe", 30, text),
        finding("scores-tail", "warning", 30, text),
        finding("duplicates-near", "warning", 9_000, text),
        finding("leakage-attribute", "note", 450, text, file=False),
    )
    counts = tuple(int(4000 * 0.7**i) for i in range(20)) + (0,) * 15 + (3,) * 5
    edges = tuple(np.linspace(0, 40, 41).tolist())
    words = tuple((f"word{i} {text}", 100 - i, i / 7, None if i == 3 else f"x{i}") for i in range(45))
    tables = (
        Table("leakage", "auroc", f"How well {text}", ("facts", "AUROC"), (("colours", 0.7), ("sizes", 0.6)), 2),
        Table("captions", "floods", f"Floods {text}", (f"caption {text}", "pairs", "share", "other"), words, 1_000),
    )
    unseen = (Unseen("domains", f"no pair has a url {text}", f"give some {text}"),)
    histograms = (
        Histogram(
            "scores", "scores:slof(k=16)", f"Distribution of slof {text}", edges, counts, sum(counts), 9.5, "tail"
        ),
        Histogram("similarity", "similarity", "Published similarity", edges, counts, sum(counts), None, "other"),
    )
    audited = Audited(
        Dataset(f"/data/my crawl{text}", "shards", 12, 1, PAIRS, "8978b337a8029ede"),
        verdict(findings, unseen),
        findings,
        tables,
        histograms,
        unseen,
        ("captions", "domains", "duplicates", "leakage", "natural_backdoors", "scores"),
    )
    members = {}
    for first, name, whole in (
        (0, "natural_backdoors-near_identical", True),
        (25, "scores-tail", True),  # five of the pairs are in the first, too
        (60, "duplicates-near", False),
    ):
        shown, numbers = pairs(first, text), range(first, first + 30)
        members[name] = Members(
            shown,
            shown,
            GROUPS,
            30 if whole else 8_995,
            listed(numbers) if whole else None,
            keep=0 if whole else 1,
            file=f"/data/audited/findings/{name}.parquet",
        )
    place = (f"00000000{text}", uid(1))
    reasons = {place: [(one.audit + "-" + one.kind, f"why {text}") for one in findings[:2]]}
    selection = Selection(
        "removal.csv",
        REMOVAL.scoring("removal"),
        REMOVAL.scores("removal"),
        "removal",
        REMOVAL.filter("removal"),
    )
    return {
        "audited": audited,
        "members": members,
        "reasons": reasons,
        "selection": selection,
        "version": "mithridate 0.1.0",
    }


def page(text: str = "") -> str:
    return render_audit(**parts(text))
