// What the dashboard is about: the dictionary, what it was measured on, and how well it does.

import { count, h, number } from "./dom.js";

/** The view of about.json. */
export function aboutView({ about }) {
  const rows = (list) =>
    h(
      "table",
      { class: "pairs" },
      list.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value))),
    );
  const measured = (about.metrics ?? []).map(([name, value, unit]) => [
    name,
    [typeof value === "number" ? number(value, 5) : String(value), unit].filter(Boolean).join(" "),
  ]);
  const general = [
    ["model", about.model],
    ["site", about.site],
    ["latents", count(about.d_sae)],
    ["tokens looked at", count(about.rows)],
  ].filter(([, value]) => value);
  const sae = Object.entries(about.sae ?? {}).map(([name, value]) => [name, String(value)]);
  const element = h(
    "article",
    { class: "view" },
    h("h1", {}, about.title),
    h(
      "p",
      { class: "soft" },
      "An activation is the length of what its latent adds to the reconstruction, in the units of the model's activations.",
    ),
    about.explained
      ? h("p", { class: "soft" }, `What a latent is called, where labels were not given: ${about.explained}`)
      : null,
    h(
      "div",
      { class: "tables" },
      h("section", {}, h("h2", {}, "What was looked at"), rows(general)),
      sae.length ? h("section", {}, h("h2", {}, "The dictionary"), rows(sae)) : null,
      measured.length ? h("section", {}, h("h2", {}, "How well it does"), rows(measured)) : null,
    ),
  );
  return { element, show: async () => "About" };
}
