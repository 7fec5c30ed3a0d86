"""Stored images against what the dataset published about them: was a picture swapped after the curator saw it?

Split-view poisoning (Carlini et al. 2023, "Poisoning Web-Scale Training Datasets is Practical", S&P 2024): a list of
URLs is downloaded years after it was made, and who buys an expired domain chooses what its URLs give. A hash tells, but
in practice 5 to 15% of the hashes differ for harmless reasons, so mismatches are triaged (perceptual hash, reference
copy), and what triage does not explain is counted by registrable domain: a bought one changes all its images at once.

Trade-off: perceptual hashes are easy to collide and to evade on purpose. They sort mismatches for a person and clear
nobody; `different` and the table of domains are what to look at. `recorded` believes the hash that the downloader
computed (img2dataset's compute_hash) and left in the sample's json; who can rewrite the shards can rewrite that too,
and a hash that was only carried over from the metadata proves nothing.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import sidecars, spec
from pipeline.embed import embeddings_path, read_embeddings
from pipeline.metadata import Found, Index, find, index, list_metadata, lookup, prefixes, search_order, write_join
from pipeline.progress import console
from pipeline.shard_map import Job, check_made_from, code_digest, each, locked, shard_map, succeeded
from pipeline.shards import Counts, Rejected, Sample, Shard, UidRule, list_shards, manifest, samples, uids
from pipeline.shards.image import decode
from pipeline.shards.store import absolute, join, make_folder, stamp
from pipeline.tables import MAX_TEXT, domain, said
from train.metrics import unit, wilson

if TYPE_CHECKING:
    import polars as pl
    from PIL import Image
    from rich.table import Table

OUTCOMES = ("identical", "recorded", "reencoded", "different", "undecided", "unpublished")
DECIDED = OUTCOMES[:4]
TEXTS = ("uid", "key", "url", "domain", "outcome", "algorithm", "published_hash", "stored_hash", "recorded_hash")
NUMBERS = {"distance": "int8", "similarity": "float", "similarity_change": "float", "row": "int64"}
HASHES = ("sha256", "md5")  # the stronger first; where both are published, only it counts
# Of the 64 bits. Measured on flat drawings of 64 pixels, the worst case for this hash: halving the size moves up to 10
# bits, JPEG at quality 30 up to 12 in 95% and 24 in all; unrelated drawings are within 12 in 0.02% and within 20 in 1%.
# Photographs lie far inside both. Between the two the hash does not know.
SAME_PICTURE = 12
OTHER_PICTURE = 21
ASPECT_TOLERANCE = 0.03  # rounding of sides by a resize stays below it, padding to a square does not
SUSPECT = 0.01  # false discovery rate at which a domain is called
SHOWN = 20


def published(
    shards: list[Shard],
    metadata: str,
    out: str,
    uid: UidRule,
    embeddings: str | None = None,
    reference: str | None = None,
) -> int:
    """Check shards against published metadata; returns 1 if one shows another picture or none was checked, else 0.

    `metadata` is what `list_metadata` takes; `embeddings` a folder that `embed` wrote for these shards; `reference` the
    shards of a trusted copy, joined by uid. Writes OUT/<shard>.published.parquet, a row a pair: TEXTS; `distance` in
    bits of the perceptual hash; `similarity` as published and its absolute change; and where the published row stands
    (`row` of `metadata`). Writes OUT/domains.parquet (`domain_table`), and OUT/index, by which rows are found. Raises
    InputError where an input is at fault.
    """
    out, files = absolute(out), list_metadata(metadata)
    embeddings = absolute(embeddings) if embeddings else None
    copies = list_shards(reference) if reference else []
    with locked(out):
        make_folder(join(out, "index"))
        named = [Shard(path) for path in files]
        indexes = _made("index", named, lambda file, folder: index(file.path, folder), join(out, "index"))
        trusted = _made("reference", copies, _index_uids, join(out, "index"), uid)
        read = [*files, *(copy.path for copy in copies)]
        read += [embeddings_path(embeddings, shard.name) for shard in shards] if embeddings else []
        facts = {"uid": uid, "inputs": spec.digest([(path, stamp(path)) for path in read])}
        markers = shard_map(Job("published", facts, out), shards, _Check(uid, embeddings), indexes, trusted)
        tables = [join(out, marker["output"]) for marker in markers]
        domains = domain_table(tables)
        sidecars.save(join(out, "domains.parquet"), domains.to_arrow())
    outcomes, change = Counter[str](), np.zeros(2)
    for marker in markers:
        outcomes.update(marker["facts"]["outcomes"])
        change += marker["facts"]["similarity_change"]
    _print_outcomes(outcomes, sum(marker["failed"] for marker in markers), _absent(indexes, tables), indexes)
    if change[1]:
        console.print(
            f"similarity of {change[1]:,.0f} pairs: {change[0] / change[1]:.3f} from the published one on average"
        )
    _print_domains(domains)
    if not any(outcomes[name] for name in DECIDED):
        console.print(
            f"nothing was checked: {metadata} has no usable sha256, md5 or perceptual hash of any of these pairs"
        )
        return 1
    return 1 if outcomes["different"] else 0


def _made(label: str, files: Sequence[Shard], make: Callable[..., Index], *shared: Any) -> list[Index]:
    """An index for each file, made in parallel, in the order of the files."""
    done: dict[str, Index] = {}
    for file, made in succeeded(each(label, files, make, *shared)):
        done[file.path] = made
    return [done[file.path] for file in files]


def _index_uids(shard: Shard, folder: str, uid: UidRule) -> Index:
    """Which sample of a reference shard has which uid."""
    found = uids(shard, uid)
    path = join(folder, f"{spec.digest([shard.path, uid, code_digest(), stamp(shard.path)])}.uid.npy")
    write_join(path, [np.stack([prefixes(found), np.arange(len(found), dtype=np.uint64)])])
    return Index(shard.path, shard.path, {"uid": path}, [], len(found), len(found), {})


@dataclass
class _Pair:
    """What a stored sample says of itself, and what was found out about it."""

    uid: str
    carries_uid: bool
    key: str
    url: str
    caption: str
    stored: dict[str, str]
    recorded: dict[str, str]
    found: Found | None = None
    distance: int | None = None
    similarity_change: float | None = None

    @property
    def values(self) -> Mapping[str, Any]:
        return self.found.values if self.found else {}

    @property
    def algorithm(self) -> str | None:
        return next((name for name in HASHES if self.values.get(name)), None)

    @property
    def outcome(self) -> str:
        if self.found is None:
            return "unpublished"
        if name := self.algorithm:
            if self.values[name] == self.stored[name]:
                return "identical"
            if self.values[name] == self.recorded[name]:
                return "recorded"
        if self.distance is None or SAME_PICTURE < self.distance < OTHER_PICTURE:
            return "undecided"
        return "reencoded" if self.distance <= SAME_PICTURE else "different"


@dataclass(frozen=True)
class _Check:
    """One shard against the metadata: join, compare hashes, and look at the pictures where they differ."""

    uid: UidRule
    embeddings: str | None

    def __call__(self, shard: Shard, out: str, indexes: list[Index], trusted: list[Index]) -> Counts:
        counts = Counts(output=f"{shard.name}.published.parquet")
        counts.input_sha256 = manifest(shard, self.uid).sha256
        wanted = [name for name in HASHES if any(name in made.columns for made in indexes)]
        pairs: list[_Pair] = []
        for sample in samples(shard, self.uid):
            counts.read += 1
            try:
                pairs.append(_pair(sample, wanted))
            except Rejected as error:
                counts.failed += 1
                counts.reasons[str(error)] = counts.reasons.get(str(error), 0) + 1
        _join(pairs, indexes, shard.name)
        unclear = {pair.uid: pair for pair in pairs if pair.outcome == "undecided"}
        self._compare_pictures(shard, unclear, _trusted_hashes(shard, unclear, trusted, self.uid))
        if self.embeddings:
            check_made_from(self.embeddings, shard, counts.input_sha256, "run `mithridate embed` on them")
            _compare_similarity(pairs, embeddings_path(self.embeddings, shard.name))
        counts.out = len(pairs)
        changes = [pair.similarity_change for pair in pairs if pair.similarity_change is not None]
        counts.facts = {
            "outcomes": dict(Counter(p.outcome for p in pairs)),
            "similarity_change": [sum(changes), len(changes)],
        }
        _write(join(out, counts.output), pairs)
        return counts

    def _compare_pictures(self, shard: Shard, unclear: dict[str, _Pair], trusted: dict[str, int]) -> None:
        known = {uid: int(pair.values["phash"], 16) for uid, pair in unclear.items() if pair.values.get("phash")}
        known |= trusted  # a copy of the picture itself: the same hash function on both sides
        for sample in samples(shard, self.uid) if known else ():
            if sample.uid in known:
                pair = unclear[sample.uid]
                try:
                    views = _views(decode(sample.image), pair.values)
                except Rejected:
                    continue
                pair.distance = min((phash(image) ^ known[sample.uid]).bit_count() for image in views)


def _pair(sample: Sample, wanted: Sequence[str]) -> _Pair:
    image, meta = sample.image, sample.meta
    stored = {"sha256": hashlib.sha256(image).hexdigest()}
    if "md5" in wanted:
        stored["md5"] = hashlib.md5(image, usedforsecurity=False).hexdigest()
    recorded = {name: said(meta, name) for name in HASHES}
    caption = bytes(sample.parts.get("txt", b"")[:MAX_TEXT]).decode(errors="replace") or said(meta, "caption")
    key = sample.key.rpartition("/")[2]  # img2dataset's, without the folder of a tar member
    return _Pair(sample.uid, said(meta, "uid") == sample.uid, key, said(meta, "url"), caption, stored, recorded)


def _join(pairs: list[_Pair], indexes: Sequence[Index], shard_name: str) -> None:
    """Find the published row of each pair: by DataComp's uid, else img2dataset's key, else URL.

    A key is a number within one download. Where both sides name a URL and they differ, it was another download.
    """
    captions = [pair.caption for pair in pairs]
    for by in ("uid", "key", "url"):
        wanted = {
            at: getattr(pair, by)
            for at, pair in enumerate(pairs)
            if pair.found is None and getattr(pair, by) and (by != "uid" or pair.carries_uid)
        }
        for at, row in find(indexes, shard_name, by, wanted, captions).items():
            urls = {pairs[at].url, row.values.get("url")} - {"", None}
            if by != "key" or len(urls) < 2:
                pairs[at].found = row


def phash(image: "Image.Image") -> int:
    """64-bit perceptual hash (DCT), as COYO's `image_phash` is read: hex of imagehash's bit order.

    COYO says "standard 64-bit pHash" without naming code; published values have 32 bits set and the first among them,
    as imagehash's have and those of the pHash library need not."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def _views(image: "Image.Image", values: Mapping[str, Any]) -> list["Image.Image"]:
    """The image, and its centre at the published aspect ratio where it has another one.

    img2dataset's default pads images to a square; the published hash never saw the border."""
    width, height = values.get("width"), values.get("height")
    if not width or not height or abs(image.width * height / (image.height * width) - 1) <= ASPECT_TOLERANCE:
        return [image]
    scale = min(image.width / width, image.height / height)
    wide, high = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return [image, image.crop((left, top, left + wide, top + high))]


def _trusted_hashes(
    shard: Shard, unclear: Mapping[str, _Pair], trusted: Sequence[Index], uid: UidRule
) -> dict[str, int]:
    """Perceptual hashes of the reference copies of these pairs, by uid."""
    hashes: dict[str, int] = {}
    keys = prefixes(unclear)
    for copy in search_order(trusted, shard.name, "uid", keys) if unclear else ():
        rows = set(np.concatenate(lookup(copy.joins["uid"], keys)).tolist())
        for row, sample in enumerate(samples(Shard(copy.source), uid)) if rows else ():
            if row in rows and sample.uid in unclear and sample.uid not in hashes:
                try:
                    hashes[sample.uid] = phash(decode(sample.image))
                except Rejected:
                    continue
        if len(hashes) == len(unclear):
            break
    return hashes


def _compare_similarity(pairs: list[_Pair], path: str) -> None:
    """How far the cosine of image and text is from the published one; another model moves all of them."""
    found = read_embeddings(path)
    cosine = (unit(found.image) * unit(found.text)).sum(axis=1)
    at = {uid: row for row, uid in enumerate(found.uid)}
    for pair in pairs:
        similarity = pair.values.get("similarity")
        if similarity is not None and pair.uid in at and np.isfinite(cosine[at[pair.uid]]):
            pair.similarity_change = abs(float(cosine[at[pair.uid]]) - similarity)


def _write(path: str, pairs: list[_Pair]) -> None:
    import pyarrow as pa

    rows = []
    for pair in pairs:
        values, by, url = pair.values, pair.algorithm or "sha256", pair.values.get("url") or pair.url
        texts = (pair.uid, pair.key.encode("utf-8", "replace").decode(), url, domain(url), pair.outcome, pair.algorithm)
        hashes = (values.get(by), pair.stored[by], pair.recorded[by] or None)
        place = (pair.found.row, pair.found.source) if pair.found else (None, None)
        rows.append((*texts, *hashes, pair.distance, values.get("similarity"), pair.similarity_change, *place))
    schema = pa.schema([*((name, "string") for name in TEXTS), *NUMBERS.items(), ("metadata", "string")])
    sidecars.save(path, pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema))


def domain_table(tables: list[str]) -> "pl.DataFrame":
    """Domains by how surprising their mismatches are; memory is a row a domain, however many pairs there are.

    Columns: domain; samples (published pairs); mismatches (hash differs, or picture differs); unexplained (mismatches
    that no triage found harmless); different; share = unexplained / samples with its 95% Wilson interval; p_value
    (Fisher, one-sided: as many or more unexplained among the domain's samples, were it like all the others) and q_value
    (Benjamini & Hochberg 1995, over all domains); similarity_change (mean).
    """
    import polars as pl

    hashed, is_ = pl.col("algorithm").is_not_null(), pl.col("outcome").eq
    unexplained = is_("different") | (is_("undecided") & hashed)
    counted = (
        pl.scan_parquet(tables, glob=False)
        .filter(~is_("unpublished"))
        .group_by("domain")
        .agg(
            pl.len().cast(pl.Int64).alias("samples"),
            (unexplained | (is_("reencoded") & hashed)).sum().cast(pl.Int64).alias("mismatches"),
            unexplained.sum().cast(pl.Int64).alias("unexplained"),
            is_("different").sum().cast(pl.Int64).alias("different"),
            pl.col("similarity_change").mean(),
        )
        .collect(engine="streaming")
    )
    return surprising(counted)


def surprising(counted: "pl.DataFrame") -> "pl.DataFrame":
    """`domain`, `samples` and `unexplained` with share, interval, p and q; the most surprising first."""
    import polars as pl
    from scipy.stats import false_discovery_control, hypergeom

    n, k = counted["samples"].to_numpy(), counted["unexplained"].to_numpy()
    p = np.ones(len(n))
    p[k > 0] = hypergeom.sf(k[k > 0] - 1, n.sum(), k.sum(), n[k > 0])
    low, high = zip(*map(wilson, k, n), strict=True) if len(n) else ((), ())
    return counted.with_columns(
        share=pl.col("unexplained") / pl.col("samples"),
        share_low=pl.Series(low, dtype=pl.Float64),
        share_high=pl.Series(high, dtype=pl.Float64),
        p_value=pl.Series(p),
        q_value=pl.Series(false_discovery_control(p) if len(p) else p),
    ).sort("p_value", pl.col("unexplained"), "domain", descending=[False, True, False])


def _absent(indexes: Sequence[Index], tables: Sequence[str]) -> int:
    """Published rows that no sample was joined to: a flag a row, on disk."""
    first = dict(zip((made.source for made in indexes), np.cumsum([0, *(made.size for made in indexes)]), strict=False))
    with tempfile.TemporaryFile() as file:
        seen = np.memmap(file, bool, "w+", shape=(sum(made.size for made in indexes) + 1,))
        for path in tables:
            table = sidecars.read(path, ("metadata", "row"), "run the same command again")
            for source, row in zip(table["metadata"].to_pylist(), table["row"].to_pylist(), strict=True):
                if source is not None:
                    seen[first[source] + row] = True
        return sum(made.rows for made in indexes) - int(np.count_nonzero(seen))


def _print_outcomes(outcomes: Counter[str], failed: int, absent: int, indexes: Sequence[Index]) -> None:
    total = outcomes.total()
    table = _table("outcome", "pairs", "share (95%)")
    for name in OUTCOMES:
        table.add_row(name, f"{outcomes[name]:,}", _share(outcomes[name], total))
    console.print(table)
    console.print(
        f"of {total:,} pairs; {failed:,} samples without an image; {absent:,} published rows without a sample"
    )
    invalid = Counter[str]()
    for made in indexes:
        invalid.update(made.invalid)
    if invalid:
        console.print(
            "published values that cannot be used: " + "; ".join(f"{n:,} x {why}" for why, n in invalid.items())
        )


def _print_domains(domains: "pl.DataFrame") -> None:
    from rich.text import Text

    from pipeline.report.text import one_line

    table = _table("domain", "pairs", "mismatches", "unexplained", "different", "share (95%)", "q")
    for row in domains.filter(domains["unexplained"] > 0).head(SHOWN).iter_rows(named=True):
        counts = (f"{row[name]:,}" for name in ("samples", "mismatches", "unexplained", "different"))
        style = "bold red" if row["q_value"] < SUSPECT else ""
        share = _share(row["unexplained"], row["samples"])
        table.add_row(Text(one_line(row["domain"] or "–"), style), *counts, share, f"{row['q_value']:.2g}")
    if table.row_count:
        console.print(table)
    called = int((domains["q_value"] < SUSPECT).sum())
    console.print(f"{called:,} of {len(domains):,} domains have more mismatches than the others (q < {SUSPECT})")


def _table(first: str, *numbers: str) -> "Table":
    from rich.table import Table

    table = Table(first, box=None, header_style="bold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _share(k: int, n: int) -> str:
    if not n:
        return "–"
    low, high = wilson(k, n)
    return f"{100 * k / n:.1f}% ({100 * low:.1f}–{100 * high:.1f})"
