"""Build the embedded data set: `python pipeline/demo/build.py OUT`.

Small, real and redistributable were worth more than photographic: people drew every picture and wrote every word, and
each row says under which licence. The price is that it is not the web: no photographs, 64 pixels, captions of one to a
dozen words. Training has six styles of emoji; a seventh, Twemoji, is held out, so accuracy on it measures
generalisation and not memory. Openclipart adds pictures without classes and captions with honest noise.

The sources are packages pinned by version and sha256, fetched with npm and apt-get (so Debian bookworm is needed). No
randomness and no clock: two runs write identical bytes. Archives are read in memory and never unpacked to disk.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, ImageChops, ImageOps

SIDE, ROWS = 64, 1000  # of a picture in pixels, of a shard
EVAL = "twemoji"
SHARE_ALIKE = "CC-BY-SA-4.0"  # rows of this licence get shards of their own
STYLES = {  # package of @iconify-json: (SPDX licence, sha256); what fxemoji declares, Apache, is for its code only
    "noto@1.2.9": ("Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1@1.2.5": ("Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fxemoji@1.2.2": ("CC-BY-4.0", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "fluent-emoji-flat@1.2.6": ("MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "twemoji@1.2.5": ("CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "emojione@1.2.3": ("CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "openmoji@1.2.29": ("CC-BY-SA-4.0", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
}
WORDS = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
CLIPART = ("openclipart-svg=1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")

# openclipart: 1,375 random stars, gradients, copies and grey buttons of one desktop show nothing that
# a caption could name; logos are trademarks.
SKIP_FOLDERS = re.compile(
    "(shapes/stars|special|logos|unsorted/dup|recreation/games/cards|computer/icons/(flat|lemon-theme/(apps|mime)))"
)
SKIP_NAMES = re.compile(r"sexy|nude|naked|nazi|swastika|reich|sunwheel|stripper|pantyhose", re.I)
# Not captions but the names of collections, of tools and of nothing at all.
BOILERPLATE = re.compile(
    r"collection|theme|icon ?set|submission|sibmission|clip ?arts?\b|untitled|unnamed|unknown|symbol.signs"
    r"|rpg map|signs and symbols|hash\(|inkscape|sodipodi|license|public domain|https?:|www\.|@|contact:|converted",
    re.I,
)
WORD = re.compile(r"[^\W\d_]{3}")
NOT_WORDS = set(
    "hash unsorted icons icon theme computer svg png clip art clipart image images misc special "
    "gnome stock emblem mime mimetypes mime-types menu action actions application applications apps "
    "filesystem filesystems device devices appicon webpage signs_and_symbols copy final new the for with "
    "and geometry magick aiga rpg elements elemen element mapsym bb fs lemon etiquette simbolo".split()
)
SAME_CAPTION = 4  # openclipart rows that may share one caption: else 50 jigsaw pieces drown a cat
XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
HOSTILE = re.compile(r"<([\w-]+:)?(fe)?image\b|<!ENTITY", re.I)  # may name a file of this machine; may explode
MAX_SVG = 600_000  # bytes: the few larger ones are traced photographs


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def output(command, **how):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **how).stdout  # noqa: S603, ours alone


def fetch(command, digest):
    """The one file that `command` downloads, refused unless it is the one we know."""
    with tempfile.TemporaryDirectory() as folder:
        output(command, cwd=folder)
        (archive,) = [path.read_bytes() for path in Path(folder).iterdir()]
    if (found := hashlib.sha256(archive).hexdigest()) != digest:
        sys.exit(f"{command[-1]}: sha256 is {found}, expected {digest}")
    return io.BytesIO(archive)


def members(tar, suffix):
    """name, bytes of the regular files only: links and devices in an archive are never followed."""
    for member in tar:
        if member.isfile() and member.name.endswith(suffix):
            yield member.name, tar.extractfile(member).read()


def npm(package, digest):
    with tarfile.open(fileobj=fetch(["npm", "pack", "--silent", "--ignore-scripts", package], digest)) as tar:
        return {name.removeprefix("package/"): json.loads(data) for name, data in members(tar, ".json")}


def squash(name):
    """'flag: Åland Islands' and 'flag-for-flag-aland-islands' are one concept."""
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^flag-for-(flag-)?", "flag-", name).replace("&", "and"))


def plain(text):
    return unicodedata.normalize("NFC", text).replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')


def concepts(words):
    """Emoji without skin tones (one concept, one share), and without hair, tones and letter tiles."""
    subgroups = {row["order"]: row["message"] for row in words["en/messages.json"]["subgroups"]}
    by_code, tags_of, names, nicknames = {}, {}, {}, collections.defaultdict(set)
    for row in words["en/data.json"]:
        if row.get("group", 2) == 2:
            continue
        label, code = plain(row["label"]), row["hexcode"]
        tags = {plain(tag) for tag in [*row["tags"], subgroups[row["subgroup"]].removeprefix("other ")]}
        # A tag that repeats the label, an emoticon or a lone digit says nothing new.
        known = label.lower()
        tags_of[label] = {t for t in tags if re.fullmatch("[A-Za-z][A-Za-z' -]{2,}", t) and t.lower() not in known}
        by_code[code.replace("-FE0F", "")] = names[squash(label)] = label
        aka = [words["meta/unicode-names.json"].get(code, "")]
        for book in ("cldr", "emojibase", "github", "iamcal", "joypixels"):
            codes = words[f"en/shortcodes/{book}.json"].get(code, [])
            aka += [codes] if isinstance(codes, str) else codes
        for name in aka:
            nicknames[squash(name)].add(label)
    # A nickname that two concepts share names neither.
    names = {name: min(of) for name, of in nicknames.items() if name and len(of) == 1} | names
    return by_code, tags_of, names


def tagged(caption, tags, most, salt):
    """The caption and 0 to `most` of the tags, chosen by hash."""
    tags = sorted(tags, key=lambda tag: sha(f"{salt}/{tag}"))
    return ", ".join([caption, *tags[: int(sha(salt)[:8], 16) % (most + 1)]])


def emoji(source, licence, package, by_code, tags_of, names):
    """One picture of every concept that this artist drew."""
    icons = package["icons.json"]
    aliases = {name: of["parent"] for name, of in icons.get("aliases", {}).items() if len(of) == 1}  # else mirrored
    chosen: dict[str, str] = {}  # label: icon name
    for code, name in sorted(package["chars.json"].items()):
        if label := by_code.get(code.upper().replace("-FE0F", "")):
            chosen.setdefault(label, name)
    for name in sorted([*icons["icons"], *aliases]):
        if label := names.get(squash(name)):
            chosen.setdefault(label, name)
    for label, name in sorted(chosen.items()):
        icon = icons | icons["icons"].get(aliases.get(name, name), {})
        if "body" in icon:
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
            svg = f'<svg {XMLNS} viewBox="{box}">{icon["body"]}</svg>'
            caption = label if source == EVAL else tagged(label, tags_of[label], 3, f"{source}/{name}")
            yield row(source, licence, name, caption, svg, label=label)


def tidy(text):
    """Markup, mojibake, underscores, file endings and addresses out of a caption."""
    text = html.unescape(html.unescape(text))
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode("utf-8")
    text = re.sub(r"^clipart by [\w ]+ - ", "", plain(text), flags=re.I)
    text = re.sub(r"<[^>]*>|\S+@\S+|\.(svg|png|jpe?g|eps|ai)\b", " ", text, flags=re.I)
    text = "".join(c if c.isprintable() else " " for c in text.replace("_", " "))
    return re.sub(r"\s+", " ", text).strip(" .,;:-*#\"'")


def field(tag, svg):
    found = re.search(rf"<dc:{tag}>(.*?)</dc:{tag}>", svg, re.S)
    return found[1] if found else ""


def stem_words(name, author):
    """'food/open_book_nae_02' of Nathan Eady -> 'open book': names carry cut-off signatures and numbers."""
    signature = re.findall(r"[a-z]{2,}", author.lower())
    stem = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.rsplit("/", 1)[-1])
    words = [w for w in re.findall(r"[^\W\d_]{2,}", stem.lower()) if w not in NOT_WORDS]
    return " ".join(w for w in words if not any(part.startswith(w) for part in signature))


def clipart(package, digest):
    """The openclipart pictures that say what they show."""
    works, titles = [], collections.Counter[str]()
    unpacked = output(["dpkg", "--fsys-tarfile", "-"], input=fetch(["apt-get", "download", package], digest).read())
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        files = sorted(members(tar, ".svg"))
    for path, data in files:
        name = path.split("/svg/")[1].removesuffix(".svg")
        if b"PublicDomain" not in data or len(data) > MAX_SVG or SKIP_FOLDERS.match(name) or SKIP_NAMES.search(name):
            continue
        svg = data.decode("latin-1" if b"iso-8859-1" in data[:99].lower() else "utf-8", "replace")
        title = tidy(field("title", svg))
        works.append((name, title, svg))
        titles[title.lower()] += 1
    for name, title, svg in works:
        note, author = tidy(field("description", svg)), tidy(field("title", field("creator", svg)))
        # A title that many pictures bear is their series; what one of them shows is in its file name.
        series = titles[title.lower()] > 3 or BOILERPLATE.search(title) or title.lower() in author.lower()
        if series or not WORD.search(title):
            title = stem_words(name, author)
        if not WORD.search(title) or SKIP_NAMES.search(title):
            continue
        if 2 <= len(note.split()) <= 14 and not BOILERPLATE.search(note):
            said = title.lower() in note.lower() or note.lower() in title.lower()
            caption = max(title, note, key=len) if said else f"{title}, {note}"
        else:
            tags = {tidy(tag).lower() for tag in re.findall("<rdf:li>(.*?)</rdf:li>", svg)}
            tags = {t for t in tags - NOT_WORDS if len(t) < 25 and WORD.search(t) and not BOILERPLATE.search(t)}
            caption = tagged(title, {t for t in tags if t not in f"{title} {author}".lower()}, 2, name)
        yield row("openclipart", "CC-PDDC", name, caption, svg, author=author)


def row(source, licence, name, caption, svg, label=None, author=None):
    key = f"{source}-{re.sub('[^A-Za-z0-9_-]+', '-', name.replace('+', 'plus'))}"
    made = {"uid": sha(f"{source}/{name}")[:32], "key": key, "source": source, "license": licence, "author": author}
    return made | {"txt": caption, "label": label, "svg": svg}


def draw(row):
    """The row with its picture, or None where nothing visible came out."""
    if HOSTILE.search(row["svg"]):
        return None
    try:
        # dpi 90: what the drawing programs of openclipart's time meant by a point. No system fonts:
        # the picture must not depend on the machine.
        png = resvg_py.svg_to_bytes(row["svg"], width=4 * SIDE, height=4 * SIDE, dpi=90, skip_system_fonts=True)
    except ValueError:
        return None
    flat = Image.open(io.BytesIO(png)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    if row["source"] == "openclipart":  # a drawing is often a stamp in the corner of an A4 page
        ink = ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).convert("L")
        box = ink.point(lambda v: 255 * (v > 8)).getbbox()
        if box is None or max(box[2] - box[0], box[3] - box[1]) < SIDE // 2:
            return None
        flat = ImageOps.expand(flat.crop(box), 4, "white")
    flat = ImageOps.pad(flat, (SIDE, SIDE), Image.Resampling.BILINEAR, color="white")
    pixels = np.asarray(flat, dtype=np.int16)
    if (pixels.min(axis=2) < 200).mean() < 0.03:  # failed renders, and lines too thin for 64 pixels
        return None
    out = io.BytesIO()
    flat.save(out, "WEBP", quality=75, method=6)
    return {**row, "webp": out.getvalue()}


def write(rows, folder, first=0):
    """The rows come in the order of their hashes, so every shard mixes its sources; returns the next shard's number."""
    folder.mkdir(parents=True, exist_ok=True)
    names = "uid key webp txt label source license author".split()
    schema = pa.schema([(n, pa.binary() if n == "webp" else pa.string()) for n in names])
    shards = max(1, round(len(rows) / ROWS))
    for shard in range(shards):
        part = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        pq.write_table(
            pa.Table.from_pylist(part, schema=schema),
            folder / f"{first + shard:08d}.parquet",
            compression={n: "none" if n == "webp" else "zstd" for n in names},
            use_dictionary=["source", "license", "author"],
            write_statistics=False,
        )
    return first + shards


def main(out):
    book = concepts(npm(*WORDS))
    rows = list(clipart(*CLIPART))
    for pin, (licence, digest) in STYLES.items():
        rows += emoji(pin.split("@")[0], licence, npm(f"@iconify-json/{pin}", digest), *book)
    # Of equal pictures the first stays: the held-out style's, then the plainer concept's (France's, not Clipperton's).
    rows.sort(key=lambda r: (r["source"] != EVAL, len(r["label"] or r["txt"]), r["uid"]))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        drawn = [r for r in pool.map(draw, rows, chunksize=64) if r]
    kept: dict[bytes, dict] = {}
    captions = collections.Counter[tuple]()
    for r in drawn:
        captions[r["label"], r["txt"].lower()] += 1
        if r["label"] or captions[None, r["txt"].lower()] <= SAME_CAPTION:
            kept.setdefault(r["webp"], r)
    assert len({r["key"] for r in kept.values()}) == len(kept), "keys must be unique"
    whole = sorted(kept.values(), key=lambda r: r["uid"])
    train = [r for r in whole if r["source"] != EVAL]
    labels = {r["label"] for r in train}
    test = [r for r in whole if r["source"] == EVAL and r["label"] in labels]
    mixed = write([r for r in train if r["license"] != SHARE_ALIKE], out / "train")
    write([r for r in train if r["license"] == SHARE_ALIKE], out / "train", mixed)
    write(test, out / "eval")
    (out / "classes.txt").write_text("".join(f"{label}\n" for label in sorted(r["label"] for r in test)))
    for (source, licence), n in sorted(collections.Counter((r["source"], r["license"]) for r in train + test).items()):
        print(f"{source:20} {licence:13} {n:6}")
    print(f"train {len(train)}, eval {len(test)}; never trained, so dropped: {len(kept) - len(train) - len(test)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
