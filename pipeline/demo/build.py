"""Build the embedded data set: `python pipeline/demo/build.py OUT`.

Small, real and redistributable were worth more than photographic: every picture was drawn by a
person, every caption was written by one, and each row says under which licence. The price is that
it is not the web: no photographs, 64 pixels, words of one to a dozen. Six artists drew the emoji of
the training set; a seventh, OpenMoji, is held out, so accuracy on it measures generalisation and
not memory. Openclipart adds pictures without classes and captions with honest noise.

The sources are packages pinned by version and sha256, fetched with npm and apt-get (openclipart
needs Debian or a relative of it). No randomness and no clock: two runs write identical bytes. What
a package holds is read from its archive in memory and never unpacked to disk.
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

SIDE = 64
ROWS = 1000  # a shard
EVAL = "openmoji"
STYLES = {  # package of @iconify-json: (SPDX licence, sha256)
    "noto@1.2.9": ("Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1@1.2.5": ("Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fxemoji@1.2.2": ("Apache-2.0", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "fluent-emoji-flat@1.2.6": ("MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "twemoji@1.2.5": ("CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "emojione@1.2.3": ("CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "openmoji@1.2.29": ("CC-BY-SA-4.0", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
}
WORDS = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
CLIPART = ("openclipart-svg=1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")
CLIPART_LICENCE = "CC-PDDC"  # the Creative Commons public domain dedication of 2004

# openclipart: 1,375 random stars, gradients, copies and grey buttons of one desktop show nothing that
# a caption could name; logos are trademarks.
SKIP_FOLDERS = re.compile(
    "(shapes/stars|special|logos|unsorted/duplicates|recreation/games/cards|computer/icons/flat-theme)/"
)
SKIP_NAMES = re.compile(r"sexy|nude|naked|nazi|swastika|reich", re.I)
# Not captions but the names of collections, of tools and of nothing at all.
BOILERPLATE = re.compile(
    r"collection|theme|icon ?set|submission|sibmission|clip ?arts?\b|untitled|unnamed|unknown|symbol.signs"
    r"|rpg map|inkscape|sodipodi|license|public domain|https?:|www\.|@|contact:|converted from",
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
BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # of an icon, with iconify's defaults
XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
MAX_SVG = 600_000  # bytes: the few larger ones are traced photographs


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(command, digest, folder):
    """The archive that `command` leaves in `folder`, refused unless it is the one we know."""
    folder.mkdir()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (archive,) = folder.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{command[-1]}: sha256 is {found}, expected {digest}")
    return archive


def members(tar, suffix):
    """name, bytes of the regular files only: links and devices in an archive are never followed."""
    for member in tar:
        if member.isfile() and member.name.endswith(suffix):
            yield member.name, tar.extractfile(member).read()


def npm(package, digest, folder):
    archive = fetch(["npm", "pack", "--ignore-scripts", package], digest, folder)
    with tarfile.open(archive) as tar:
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
        tags = {plain(tag) for tag in [*row["tags"], subgroups[row["subgroup"]]]}
        # A tag that repeats the label, an emoticon or a lone digit says nothing new.
        tags = {t for t in tags if re.fullmatch("[A-Za-z][A-Za-z' -]{2,}", t) and t.lower() not in label.lower()}
        tags_of[label] = sorted(tags)
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


def emoji(source, package, by_code, tags_of, names):
    """One picture of every concept that this artist drew."""
    icons = package["icons.json"]
    aliases = icons.get("aliases", {})
    chosen = {}  # label: icon name
    for code, name in sorted(package["chars.json"].items()):
        if label := by_code.get(code.upper().replace("-FE0F", "")):
            chosen.setdefault(label, name)
    for name in sorted([*icons["icons"], *aliases]):
        if label := names.get(squash(name)):
            chosen.setdefault(label, name)
    for label, name in sorted(chosen.items()):
        turn = aliases.get(name, {})
        icon = icons["icons"].get(turn.get("parent", name))
        if icon is None:
            continue
        box = [icon.get(k, icons.get(k, default)) for k, default in BOX]
        svg = f'<svg {XMLNS} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        caption = label
        if source != EVAL:
            luck = sha(f"{source}/{name}")
            tags = sorted(tags_of[label], key=lambda tag: sha(luck + tag))
            caption = ", ".join([label, *tags[: int(luck[:8], 16) % 4]])
        yield row(source, name, caption, svg, label=label, mirror=turn.get("hFlip", False))


def tidy(text):
    """Markup, mojibake, underscores, file endings and collection marks out of a caption."""
    text = html.unescape(html.unescape(text))
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode("utf-8")
    text = re.sub(r"^clipart by [\w ]+ - ", "", plain(text), flags=re.I)
    text = re.sub(r"<[^>]*>|\.(svg|png|jpe?g|eps|ai)\b", " ", text, flags=re.I)
    text = "".join(c if c.isprintable() else " " for c in text.replace("_", " "))
    return re.sub(r"\s+", " ", text).strip(" .,;:-*#\"'")


def field(tag, svg):
    found = re.search(rf"<dc:{tag}>(.*?)</dc:{tag}>", svg, re.S)
    return found[1] if found else ""


def stem_words(name, author):
    """'food/open_book_nae_02' of Nathan Eady -> 'open book': names carry cut-off signatures and numbers."""
    signature = re.findall(r"[a-z]{2,}", author.lower())
    stem = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.rsplit("/", 1)[-1])
    words = [w for w in re.split(r"[\W\d_]+", stem.lower()) if len(w) > 1 and w not in NOT_WORDS]
    return " ".join(w for w in words if not any(name.startswith(w) for name in signature))


def clipart(archive):
    """The openclipart pictures that say what they show."""
    works, titles = [], collections.Counter()
    with subprocess.Popen(["dpkg", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as dpkg:
        with tarfile.open(fileobj=dpkg.stdout, mode="r|") as tar:
            files = sorted(members(tar, ".svg"))
    for path, data in files:
        name = path.split("/svg/")[1].removesuffix(".svg")
        # An <image> may name a file of this machine, an entity may grow without bound.
        hostile = b"<image" in data or b"<!ENTITY" in data or len(data) > MAX_SVG
        if hostile or SKIP_FOLDERS.match(name) or SKIP_NAMES.search(name) or b"PublicDomain" not in data:
            continue
        try:
            svg = data.decode()
        except UnicodeError:
            svg = data.decode("latin-1")
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
            caption = note if title.lower() in note.lower() else f"{title}, {note}"
        else:
            luck = sha(f"openclipart/{name}")
            tags = {tidy(tag).lower() for tag in re.findall("<rdf:li>(.*?)</rdf:li>", svg)}
            tags = {t for t in tags - NOT_WORDS if len(t) < 25 and WORD.search(t) and not BOILERPLATE.search(t)}
            tags = {t for t in tags if t not in title.lower() and t not in author.lower()}
            tags = sorted(tags, key=lambda tag: sha(luck + tag))
            caption = ", ".join([title, *tags[: int(luck[:8], 16) % 3]])
        yield row("openclipart", name, caption, svg, author=author, crop=True)


def row(source, name, caption, svg, label=None, author=None, crop=False, mirror=False):
    key = f"{source}-{re.sub('[^A-Za-z0-9_-]+', '-', name.replace('+', 'plus'))}"
    uid = sha(f"{source}/{name}")[:32]
    return dict(
        uid=uid, key=key, txt=caption, label=label, source=source, author=author, svg=svg, crop=crop, mirror=mirror
    )


def draw(row):
    """The row with its picture, or None where nothing visible came out."""
    try:
        # dpi 90: what the drawing programs of openclipart's time meant by a point. No system fonts:
        # the picture must not depend on the machine.
        png = resvg_py.svg_to_bytes(
            svg_string=row["svg"], width=4 * SIDE, height=4 * SIDE, dpi=90, skip_system_fonts=True
        )
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if row["mirror"]:
        image = ImageOps.mirror(image)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if row["crop"]:  # a drawing is often a stamp in the corner of an A4 page
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


def write(rows, folder):
    """Rows in the order of their hashes, so that every shard mixes all sources."""
    folder.mkdir(parents=True)
    names = ["uid", "key", "webp", "txt", "label", "source", "license", "author"]
    schema = pa.schema([(n, pa.binary() if n == "webp" else pa.string()) for n in names])
    rows = sorted(rows, key=lambda r: r["uid"])
    shards = max(1, round(len(rows) / ROWS))
    for shard in range(shards):
        part = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        pq.write_table(
            pa.Table.from_pylist(part, schema=schema),
            folder / f"{shard:08d}.parquet",
            compression={n: "none" if n == "webp" else "zstd" for n in names},
            use_dictionary=["source", "license", "author"],
            write_statistics=False,
        )


def main(out):
    licences = {pin.split("@")[0]: licence for pin, (licence, _) in STYLES.items()}
    licences["openclipart"] = CLIPART_LICENCE
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        book = concepts(npm(*WORDS, scratch / "words"))
        rows = []
        for pin, (_, digest) in STYLES.items():
            source = pin.split("@")[0]
            rows += emoji(source, npm(f"@iconify-json/{pin}", digest, scratch / source), *book)
        rows += clipart(fetch(["apt-get", "download", CLIPART[0]], CLIPART[1], scratch / "clipart"))
    rows.sort(key=lambda r: r["uid"])
    with concurrent.futures.ProcessPoolExecutor() as pool:
        drawn = [r for r in pool.map(draw, rows, chunksize=64) if r]

    # The held-out style first: what it shares with the rest leaves the rest.
    drawn.sort(key=lambda r: (r["source"] != EVAL, r["uid"]))
    kept, pictures, captions = [], set(), collections.Counter()
    for r in drawn:
        r["license"] = licences[r["source"]]
        captions[r["source"], r["txt"].lower()] += 1
        crowd = r["label"] is None and captions[r["source"], r["txt"].lower()] > SAME_CAPTION
        if r["webp"] not in pictures and not crowd:
            pictures.add(r["webp"])
            kept.append(r)
    trained = {r["label"] for r in kept if r["source"] != EVAL}
    train = [r for r in kept if r["source"] != EVAL]
    test = [r for r in kept if r["source"] == EVAL and r["label"] in trained]
    twins = [k for k, n in collections.Counter(r["key"] for r in kept).items() if n > 1]
    assert not twins, f"keys must be unique: {twins}"

    write(train, out / "train")
    write(test, out / "eval")
    (out / "classes.txt").write_text("".join(f"{c}\n" for c in sorted({r["label"] for r in test})))
    for source, n in sorted(collections.Counter(r["source"] for r in train + test).items()):
        print(f"{source:20} {licences[source]:13} {n:6}")
    print(f"train {len(train)}, eval {len(test)}, never trained {sum(r['source'] == EVAL for r in kept) - len(test)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
