// Texts cut into whole characters, each shaded by how strongly a latent fires on it.

import { ask } from "./data.js";
import { announce, button, h, number, signed } from "./dom.js";
import { explain, steppable } from "./tips.js";

const FAINT = 0.02; // a smaller part of the largest effect is not underlined

/**
 * The element of a piece, shaded by `share` of the latent's maximum. Spaces that it begins with are
 * left plain: where a line ends there, they stay behind without the word.
 */
function shaded(text, share) {
  const [space] = text.trim() ? text.match(/^ */) : [""];
  const ink = h("span", { class: "ink" }, text.slice(space.length));
  const piece = h("span", { class: "piece" }, space, ink);
  shade(piece, share);
  return piece;
}

/** Shades a piece: 0 is off, 1 the latent's maximum. */
export function shade(piece, share) {
  piece.classList.toggle("on", share > 0);
  piece.style.setProperty("--share", Math.max(0, Math.min(1, share)).toFixed(4));
}

/** A text as one stop of the keyboard; `tip` makes what a piece says, from the piece's number. */
export function text(pieces, shares, tip) {
  const spans = pieces.map((piece, i) => shaded(piece, shares[i]));
  spans.forEach((span, i) => explain(span, () => tip(i)));
  const line = h("p", { class: "text", dir: "auto", role: "group" }, spans);
  steppable(line, spans);
  return { line, spans };
}

/** What the tip of a piece says: each token's own value, and the effect if it is known. */
function values(example, at, effects) {
  const names = example.tokens?.[at];
  const row = (name, value, effect) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", dir: "auto" }, name),
      h("td", {}, number(value)),
      effects ? h("td", { class: effect > 0 ? "helped" : "hurt" }, signed(effect)) : null,
    );
  const first = firstTokens(example)[at];
  const rows = example.values[at].map((value, token) => {
    const name = names?.length ? names[token] : example.pieces[at];
    return row(name, value, effects?.[first + token]);
  });
  const head = effects
    ? h("tr", {}, h("td"), h("td", {}, "activation"), h("td", {}, "raises log p by"))
    : null;
  return h("table", {}, head, rows);
}

/** The number of each piece's first token, counted from the example's. */
function firstTokens(example) {
  let next = 0;
  return example.values.map((own) => (next += own.length) - own.length);
}

/**
 * An example of a latent as an item of a list.
 *
 * latent: with index and max; address: the link to this very example; ablatable: whether there is a
 * server that can tell what the latent does to the text; onAblated: called when one was.
 */
export function exampleItem(latent, example, { address, ablatable, onAblated }) {
  let effects = null;
  const strengths = example.values.map((own) => Math.max(0, ...own));
  const shares = strengths.map((value) => value / latent.max);
  const { line, spans } = text(example.pieces, shares, (i) => values(example, i, effects));
  spans[example.peak]?.classList.add("peak");
  const peak = number(strengths[example.peak] ?? 0);
  line.setAttribute("aria-label", `Example with a peak of ${peak}: ${example.pieces.join("")}`);
  const said = h("p", { class: "soft effect", hidden: true });
  const ablate = async () => {
    const stop = example.start + example.values.flat().length;
    const { sequence, start } = example;
    asking.disabled = true;
    asking.textContent = "ablating …";
    said.hidden = false;
    try {
      ({ effects } = await ask("ablate", { latent: latent.index, sequence, start, stop }));
      said.textContent = underline(example, spans, effects);
      onAblated();
      asking.hidden = true;
    } catch (error) {
      said.textContent = error.message;
      asking.disabled = false;
      asking.textContent = "try again";
    }
    announce(said.textContent);
  };
  const asking = button("ablate", ablate, {
    title: "What the latent does to the probability of each token here",
  });
  return h(
    "li",
    { class: "example" },
    line,
    h(
      "div",
      { class: "beside" },
      h("a", { href: address, title: `sequence ${example.sequence}: link to this example` }, peak),
      ablatable ? asking : null,
    ),
    said,
  );
}

/**
 * Underlines the tokens whose probability the latent changes; returns a sentence about it.
 *
 * An effect is by how much the log-probability falls when the latent is taken out: above zero it
 * helps. It is shown under the token that is predicted, not under the one that predicts it.
 */
function underline(example, spans, effects) {
  const firsts = firstTokens(example);
  const byPiece = example.values.map((own, i) =>
    effects.slice(firsts[i], firsts[i] + own.length).reduce((a, b) => a + b, 0),
  );
  const largest = Math.max(...byPiece.map(Math.abs));
  if (!(largest > 0)) return "Taking the latent out changes the probability of no token here.";
  byPiece.forEach((effect, i) => {
    const share = Math.abs(effect) / largest;
    if (share < FAINT) return;
    spans[i].classList.add(effect > 0 ? "helped" : "hurt");
    spans[i].style.setProperty("--effect", share.toFixed(4));
  });
  const at = byPiece.findIndex((effect) => Math.abs(effect) === largest);
  const does = byPiece[at] > 0 ? "raises" : "lowers";
  return (
    `Here it matters most for “${example.pieces[at]}”: it ${does} its log-probability by ` +
    `${number(largest)} nats.`
  );
}
