// What was said of a latent, by all ways, with how well it holds beside its controls.

import { h, number } from "./dom.js";

const CONTROLS = { shuffled: "another's", none: "saying nothing" };

/** The section of a latent's page; null where latents were not explained. */
export function explanations({ explanations: all }) {
  if (!all) return null;
  return h(
    "section",
    { class: "explained" },
    h("h2", {}, "What is said of it"),
    all.length
      ? h(
          "p",
          { class: "soft" },
          "Each was tested on text that it was not made of. Beside its score are those of another " +
            "latent's explanation, and of one that says nothing, in its place.",
        )
      : h("p", { class: "soft" }, "It was not explained."),
    h("ul", {}, all.map(item)),
  );
}

function item({ by, method, text, kind, model, scores }) {
  const how = [by || "without an explanation", method, kind, model].filter(Boolean).join(" · ");
  return h(
    "li",
    {},
    text ? h("p", { dir: "auto" }, text) : null,
    h("p", { class: "soft" }, text === "" ? `nothing to say: ${how}` : how),
    scores.length ? h("dl", { class: "marks" }, scores.map(mark)) : null,
  );
}

function mark({ scorer, value, controls, examples, unparsable }) {
  const beside = Object.entries(controls).map(
    ([name, score]) => `${CONTROLS[name] ?? name} ${number(score, 2)}`,
  );
  if (unparsable) beside.push(`${unparsable} unreadable`);
  return h(
    "div",
    { title: examples ? `of ${examples} examples` : null },
    h("dt", {}, scorer),
    h(
      "dd",
      {},
      " ",
      h("b", {}, number(value)),
      beside.length ? h("span", { class: "soft" }, ` (${beside.join(", ")})`) : null,
    ),
  );
}
