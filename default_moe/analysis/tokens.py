"""Which tokens experts take: a table of the most telling ones, and a text whose tokens are coloured by expert."""

import html
from collections.abc import Callable, Sequence

import numpy as np

from default_moe.analysis import statistics
from default_moe.analysis.observation import Observation
from default_moe.analysis.pictures import Part
from default_moe.runs.pictures import COLORS

_TOLD = 12  # tokens of each expert
_NAMED = 3  # experts of a token, when the mouse is over it


def part(seen: Observation, sample: Observation, layers: Sequence[int], piece: Callable[[int], str]) -> Part:
    """seen: for the table.  sample: the text that is coloured.  piece: a token's text."""
    num_experts = seen.probs.shape[-1]
    tables, said = [], []
    for index, layer in enumerate(layers):
        telling = most_telling(seen.tokens, seen.first[index], num_experts)
        rows = []
        for expert, found in enumerate(telling):
            texts = [f"{_visible(piece(token))} {share:.0%}" for token, share in found[:_TOLD]]
            said.append(f"layer {layer} expert {expert}: {'  '.join(texts[:6])}")
            cells = "".join(f"<code>{html.escape(text)}</code> " for text in texts)
            rows.append(f"<tr><td>{expert}</td><td>{cells}</td></tr>")
        tables.append(
            f"<details><summary>layer {layer}</summary><table><tr><th>expert</th><th>tokens, and how many of each it "
            f"takes</th></tr>{''.join(rows)}</table></details>"
        )
    return Part("Tokens", said, html=_coloured(sample, layers, piece) + _TABLES + "".join(tables))


def most_telling(tokens_T: np.ndarray, first_T: np.ndarray, num_experts: int) -> list[list[tuple[int, float]]]:
    """For each expert tokens that tell it apart, and the share of each token's occurrences that it takes.

    In the order of n log(share / load): what the n tokens that it takes add to the mutual information of token and
    expert. Tokens that it takes less often than its load alone would have it are left out.
    """
    size = int(tokens_T.max(initial=0)) + 1
    counts = statistics.joint_counts(tokens_T, first_T, size, num_experts)
    load_N = counts.sum(axis=0) / max(counts.sum(), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(counts > 0, counts * np.log(share / load_N), 0)
    return [
        [
            (int(token), float(share[token, expert]))
            for token in np.argsort(-worth[:, expert])
            if worth[token, expert] > 0
        ]
        for expert in range(num_experts)
    ]


def expert_colors(number: int) -> list[str]:
    """Return a pale colour per expert: Okabe and Ito's for up to 8, else hues all around in three shades."""
    if number <= len(COLORS):
        rgb = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS[:number]]
        return ["#" + "".join(f"{round(255 - (255 - c) * 0.5):02x}" for c in color) for color in rgb]
    return [f"hsl({round(360 * i / number)} 70% {(60, 75, 88)[i % 3]}%)" for i in range(number)]


def color_rules(number: int) -> str:
    """Return the CSS that `coloured` needs for so many experts."""
    return "".join(f".e{expert}{{background:{color}}}" for expert, color in enumerate(expert_colors(number)))


def coloured(pieces: Sequence[str], probs_TN: np.ndarray, first_T: np.ndarray) -> str:
    """Return a text as HTML, each token in the colour of its expert, with its likeliest experts as a hint.

    pieces: the tokens' texts.  probs_TN, first_T: router probabilities and first experts in one layer.
    """
    spans = []
    for text, probs_N, first in zip(pieces, probs_TN, first_T, strict=True):
        likeliest = np.argsort(-probs_N, kind="stable")[:_NAMED]
        hint = ", ".join(f"expert {i}: {probs_N[i]:.2f}" for i in likeliest)
        spans.append(f'<span class=e{first} data-e="{first}" title="{hint}">{_as_html(text)}</span>')
    return "".join(spans)


_TABLES = (
    "<p class=caption>The tokens that tell an expert most apart, by what they add to the mutual information of token "
    "and expert, and the share of each token's occurrences that the expert takes.</p>"
)
_SCRIPT = """<script>
document.getElementById("layer").addEventListener("input", event => {
  for (const text of document.querySelectorAll(".tokens")) text.hidden = text.dataset.layer !== event.target.value;
});
document.getElementById("numbers").addEventListener("input", event => {
  document.getElementById("coloured").classList.toggle("numbered", event.target.checked);
});
</script>"""


def _coloured(sample: Observation, layers: Sequence[int], piece: Callable[[int], str]) -> str:
    num_experts = sample.probs.shape[-1]
    pieces = [piece(int(token)) for token in sample.tokens]
    legend = " ".join(f"<span class=e{expert}>&nbsp;{expert}&nbsp;</span>" for expert in range(num_experts))
    texts = []
    for index, layer in enumerate(layers):
        spans = coloured(pieces, sample.probs[index], sample.first[index])
        hidden = " hidden" if index else ""
        texts.append(f'<div class=tokens data-layer="{layer}"{hidden}>{spans}</div>')
    options = "".join(f'<option value="{layer}">layer {layer}</option>' for layer in layers)
    return (
        f"<style>{color_rules(num_experts)}</style><h3>A text by expert</h3><p class=caption>Each token of a text in "
        "the colour of the expert that counts most for it. With the mouse over a token its likeliest experts show.</p>"
        f"<p><select id=layer>{options}</select> <label><input type=checkbox id=numbers> numbers</label> {legend}</p>"
        f"<div id=coloured>{''.join(texts)}</div>{_SCRIPT}<h3>Tokens of each expert</h3>"
    )


def _as_html(text: str) -> str:
    return html.escape(text).replace("\n", "⏎<br>").replace("\t", "→&nbsp;&nbsp;&nbsp;") or "∅"


def _visible(text: str) -> str:
    """A token's text with its white space to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "→").replace("\r", "␍") or "∅"
