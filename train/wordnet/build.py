"""Builds synonyms.txt.gz from WordNet's data files: `python train/wordnet/build.py FOLDER`.

FOLDER is `usr/share/wordnet` of Debian's package wordnet-base (`dpkg -x`), or the `dict` folder of Princeton's archive.
The result is the same bytes for the same files.
"""

import gzip
import re
import sys
from pathlib import Path

WORD = re.compile(r"[a-z]{2,}")


def synsets(file: Path) -> list[tuple[str, ...]]:
    """The single words of every synset that has at least two, in the order of the file (wndb(5WN) has the format)."""
    found = []
    for line in file.read_text("ascii").splitlines():
        if line.startswith("  "):  # the licence at the head
            continue
        fields = line.split(" ")
        lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        words = [lemma.split("(")[0].lower() for lemma in lemmas]  # adjectives carry a marker: galore(ip)
        single = tuple(dict.fromkeys(word for word in words if WORD.fullmatch(word)))
        if len(single) > 1:
            found.append(single)
    return found


def main(folder: Path) -> None:
    lines = [" ".join(words) for part in ("noun", "verb", "adj", "adv") for words in synsets(folder / f"data.{part}")]
    text = "\n".join(dict.fromkeys(lines)) + "\n"
    target = Path(__file__).with_name("synonyms.txt.gz")
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{target}: {text.count(chr(10)):,} groups of words, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
