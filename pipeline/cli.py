"""`mithridate VERB …`: a verb is a function, its signature is the command line, its docstring is the help.

Only the module of the verb that was asked for is imported, so `--help` answers at once.
"""

import importlib
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from pipeline.errors import InputError

VERBS = {
    "demo": ("pipeline.demo:demo", "the whole circle on the embedded data, or on yours"),
    "poison": ("pipeline.poison:poison", "inject a published attack in a known dose; writes shards and a ledger"),
    "train": ("train.launch:train", "train CLIP under a frozen recipe; writes checkpoints and traces"),
    "embed": ("pipeline.embed:embed", "image and text embeddings of every pair, by uid"),
    "score": ("pipeline.score:score", "run detectors over embeddings and traces; writes score sidecars"),
    "filter": ("pipeline.filter:filter_shards", "keep or quarantine samples by a policy over scores"),
    "compact": ("pipeline.compact:compact", "many small shards into shards of n samples each"),
    "audit": ("pipeline.audit:audit", "what is suspicious in a dataset of which nothing is known; gates a release"),
    "manifest": ("pipeline.manifest:record", "hash shards as they are now, for verify"),
    "verify": ("pipeline.verify:verify", "are the shards still what their manifest says; which samples are not"),
    "probe": ("pipeline.probe:probe", "can poisons be found by how they are encoded: does our injection leak"),
    "evaluate": ("train.evaluate:evaluate", "zero-shot, retrieval and attack success of a checkpoint"),
    "updates": ("train.updates:updates", "how long a backdoor lives in a model that is updated with clean shards"),
    "status": ("pipeline.status:status", "how far is the job that writes to a folder"),
    "validate-attack": ("pipeline.validate_attack:validate_attack", "from which dose on an attack works, undefended"),
    "calibrate": ("pipeline.calibrate:calibrate", "choose detectors, weights and time to score by known poisons"),
    "loop": ("pipeline.loop:loop", "attacks x doses x filters x seeds from one config; writes results and a report"),
    "dose-response": (
        "pipeline.dose_response:dose_response",
        "ED50, protection factors and figures from results of loops",
    ),
    "compare": ("pipeline.compare:compare", "what is different between two results, or two audits"),
    "gallery": ("pipeline.gallery:gallery", "what the triggers look like, what a codec leaves of them, what they cost"),
    "list": (
        "pipeline.listing:list_entries",
        "the attacks, detectors, defenses, audits, policies and recipes there are",
    ),
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        print(version_text())
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mithridate VERB …    (mithridate VERB --help says more)\n")
        for verb, (_, summary) in VERBS.items():
            print(f"  {verb:<17}{summary}")
        sys.exit(0 if arguments else 2)
    if arguments[0] not in VERBS:
        print(f"mithridate: no verb {arguments[0]!r}; there are: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    run(arguments[0], arguments[1:])


def run(verb: str, arguments: list[str] | None = None) -> None:
    """Run a verb on `arguments` (default: the command line) and exit with its verdict.

    0 done; 1 work was lost or a check failed; 2 the input is at fault; 130 interrupted. A line says what to do.
    """
    import tyro

    signal.signal(signal.SIGTERM, _as_interrupt)  # what schedulers send
    module, name = VERBS[verb][0].split(":")
    function = getattr(importlib.import_module(module), name)
    try:
        code = tyro.cli(function, prog=f"mithridate {verb}", args=arguments)
    except InputError as error:
        print(f"mithridate {verb}: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mithridate {verb}: {where}{error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"mithridate {verb}: interrupted; what is written is whole, the same command finishes", file=sys.stderr)
        code = 130
    sys.exit(code)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def version_text() -> str:
    try:
        return f"mithridate {version('mithridate')}"
    except PackageNotFoundError:  # run from a working directory, as on a Ray cluster
        return "mithridate from source"


if __name__ == "__main__":
    main()
