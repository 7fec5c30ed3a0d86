"""Coverage-guided fuzzing of everything that reads the bytes of strangers, with atheris.

    uv pip install --group fuzz
    TMPDIR=/dev/shm python -m tests.fuzz.run tar|gzip|parquet|json|image|manifest --seconds 300

Our modules are instrumented; pyarrow, PIL and zlib are black boxes, of which only the behaviour is seen. The corpus and
what broke a property lie in --folder: `crash-…` raised, `timeout-…` took longer than 10 s, `oom-…` 2 GiB. A crash is
run again with `--seconds 0 FILE`. TMPDIR in memory, because each input is written to a file.
"""

import argparse
import gzip
import sys
import tempfile
import zlib
from pathlib import Path

import atheris

TARGETS = ("tar", "gzip", "parquet", "json", "image", "manifest")
SECONDS, MEGABYTES, LONGEST = 10, 2048, 64 * 1024  # of one input: time, memory, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("again", nargs="*", help="inputs to run once instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--folder", default="out/fuzz")
    arguments = parser.parse_args()
    with atheris.instrument_imports(include=["pipeline"]):
        from tests.fuzz.properties import PROPERTIES, repaired
    from tests.fuzz.seeds import seeds

    folder = Path(arguments.folder) / arguments.target
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for number, seed in enumerate(seeds(arguments.target, Path(work))):
            (corpus / f"seed-{number}").write_bytes(seed)
        shard = Path(work) / "0.tar"
        beside = shard.read_bytes() if arguments.target == "manifest" else None

    def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as name:
            if beside is not None:
                (Path(name) / "0.tar").write_bytes(beside)
            PROPERTIES[arguments.target](data, Path(name))

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        """Without this a mutation seldom gets past a checksum; every fourth is left to fail there."""
        if seed % 4 == 0:
            return atheris.Mutate(data, longest)
        if arguments.target == "gzip":
            return gzip.compress(repaired(atheris.Mutate(_unpacked(data), longest)), 1, mtime=0)[:longest]
        return repaired(atheris.Mutate(data, longest))

    bounds = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"]
    length = [f"-max_total_time={arguments.seconds}", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    inputs = arguments.again or [str(corpus)]
    packed = arguments.target in ("tar", "gzip")
    atheris.Setup([sys.argv[0], *bounds, *length, *inputs], one, custom_mutator=mutated if packed else None)
    atheris.Fuzz()


def _unpacked(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(data, LONGEST)
    except zlib.error:
        return data


if __name__ == "__main__":
    main()
