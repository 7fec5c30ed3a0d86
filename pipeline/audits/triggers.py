"""Words that occur with many others which do not occur together: objects that could be turned into physical triggers.

Trade-off: words of captions stand for objects, without a parser; "red" is one, "traffic light" two. Who relabels the
pairs with such an object needs to edit no pixel. Every dataset has them; the table says where to look first, and what
a flood of pairs of one object and one target does to the graph.
Formula: words as nodes, an edge where at least OVERLAPS drawn captions have both; betweenness centrality; of the
neighbours of a word a maximal set of which no two share an edge (greedy, the fewest edges first).
Source: Wenger et al., NeurIPS 2022 Datasets and Benchmarks, "Natural Backdoor Datasets" (2206.10673).
"""

import collections
import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from filters._captions import normalised, present
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Drawn, Found, Report, counted
from pipeline.audits._schema import Unseen

if TYPE_CHECKING:
    import networkx

READ = 512  # characters of a caption: CLIP reads 77 tokens, and a crawl's longest are pages
DRAWN = 100_000  # captions that the graph is made of: of a word in 0.1% of all a hundred
WORDS = 300  # nodes: the commonest; betweenness costs nodes times edges
OVERLAPS = 15  # captions with both words, as in the paper
CLASSES = 5  # that a trigger must be able to poison to be told
SHOWN = 20
_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP = frozenset(
    "the and for with from this that are was his her its their has have had not you your our all one two three new old "
    "who what when where which while into onto over under near down off out about after before between during through "
    "photo photos image images picture pictures stock vector illustration background icon free view close very more "
    "jpg png www com html".split()
)


@dataclass(frozen=True)
class triggers:
    """Words that could serve as physical triggers, by centrality in the caption graph (Wenger et al. 2022)."""

    needs = ("caption",)

    def map(self, rows: Rows) -> Drawn:
        drawn = Drawn.of(rows, ("caption",), DRAWN, present(rows.caption))
        cut = np.array([text[:READ] for text in drawn.columns["caption"]], object)
        return replace(drawn, columns={"caption": cut})

    def merge(self, one: Drawn, other: Drawn) -> Drawn:
        return one.merged(other)

    def report(self, merged: Drawn, marked: None, about: About) -> Report:
        import networkx

        graph, counts = _graph(merged.columns["caption"])
        if not graph.number_of_edges():
            why = f"no two words occur together in {OVERLAPS} of {len(merged):,} captions"
            return Report(unseen=[Unseen("triggers", why, "give more shards")])
        central = networkx.betweenness_centrality(graph)
        rows = []
        for word in graph:
            classes = _independent(graph, word)
            poisoned = sum(graph.edges[word, one]["pairs"] for one in classes)
            rows.append((word, central[word], counts[word], len(classes), poisoned, ", ".join(classes[:SHOWN])))
        names = ("word", "centrality", "captions", "classes", "captions of these", "which")
        table = pl.DataFrame(rows, names, orient="row").sort("centrality", "word", descending=[True, False])
        n = len(merged)
        title = f"Words that could be physical triggers, in {n:,} drawn captions"
        out = Report(tables=[counted(table, "triggers", "words", title, dict(zip(names, names, strict=True)))])
        usable = table.filter(pl.col("classes") >= CLASSES)
        if usable.height:
            first = usable.row(0, named=True)
            out.found.append(
                Found(
                    kind="physical",
                    severity="note",
                    title=f"{usable.height:,} of {len(table):,} common words could serve as physical triggers, first "
                    f"of all {first['word']!r}, which occurs with {first['classes']:,} words that are never together",
                    n=int(first["captions"]),
                    of=n,
                    explanation="Captions that name such an object need only be relabelled, no pixel edited, to make "
                    "the object a trigger. Every dataset has some; those that a target's captions name are worth a "
                    "look.",
                    source="Wenger et al., NeurIPS 2022 (2206.10673)",
                    remedy="mithridate validate-attack CONFIG OUT2  # with cooccurrence(…)",
                )
            )
        return out


def _graph(captions: np.ndarray) -> tuple["networkx.Graph", collections.Counter[str]]:
    """Words that share captions, `pairs` of them on the edge; and in how many captions each word is."""
    import networkx
    from scipy.sparse import csr_array

    words = [sorted(set(_WORD.findall(text)) - _STOP) for text in normalised(captions)]
    counts = collections.Counter(itertools.chain.from_iterable(words))
    known = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS]]
    at = {word: i for i, word in enumerate(known)}
    found = [(row, at[word]) for row, of in enumerate(words) for word in of if word in at]
    rows, columns = np.asarray(found, np.int64).reshape(-1, 2).T
    has = csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(words), len(known)))
    together = (has.T @ has).toarray()
    graph = networkx.Graph()
    graph.add_nodes_from(known)
    for i, j in np.argwhere(np.triu(together, 1) >= OVERLAPS):
        graph.add_edge(known[i], known[j], pairs=int(together[i, j]))
    return graph, counts


def _independent(graph: "networkx.Graph", word: str) -> list[str]:
    """Neighbours of a word of which no two are neighbours, most captions first."""
    near = graph.subgraph(graph[word])
    taken: set[str] = set()
    for one in sorted(near, key=lambda name: (near.degree[name], name)):
        if taken.isdisjoint(near[one]):
            taken.add(one)
    return sorted(taken, key=lambda name: (-graph.edges[word, name]["pairs"], name))
