// The page of one latent.

import { diverging, histogram } from "./charts.js";
import * as data from "./data.js";
import { button, count, failure, h, number, percent } from "./dom.js";
import { beside } from "./order.js";
import { explanations } from "./explanations.js";
import { exampleItem } from "./texts.js";

/** The view of a latent; `dashboard` is what app.js shares with all views. */
export function latentView(dashboard) {
  const element = h("article", { class: "view" });
  let wanted = null; // what was asked for last: what comes late is not shown

  async function show({ parts, query }) {
    const [name, , group, at] = parts;
    const index = Number(name);
    const latents = dashboard.about.d_sae;
    const request = (wanted = {});
    if (!/^\d+$/.test(name ?? "") || index >= latents) {
      delete element.dataset.latent;
      element.replaceChildren(
        h(
          "div",
          { class: "message" },
          h(
            "p",
            {},
            `There is no latent ${name || "without a number"}: they go from 0 to ${count(latents - 1)}.`,
          ),
          h("a", { href: dashboard.listAddress(query) }, "To the list"),
        ),
      );
      return "No such latent";
    }
    const again = () => show({ parts, query });
    if (element.dataset.latent !== String(index)) {
      element.replaceChildren(h("p", { class: "message soft" }, `Opening latent ${index} …`));
    }
    try {
      const latent = await data.latent(index, dashboard.about.shard);
      const order = await dashboard.list(query).catch(() => new Uint32Array());
      const labels = await dashboard.labels.catch(() => new data.Labels(latents));
      if (request !== wanted) return null;
      if (element.dataset.latent !== String(index) || element.dataset.query !== String(query)) {
        element.replaceChildren(...content(dashboard, latent, { order, labels, query }));
        window.scrollTo(0, 0);
      }
      element.dataset.latent = index;
      element.dataset.query = query;
      if (group !== undefined) point(element, group, at);
    } catch (error) {
      delete element.dataset.latent;
      if (request === wanted) element.replaceChildren(failure(error, again));
    }
    return `Latent ${index}`;
  }

  return { element, show };
}

/** Goes to one example and marks it. */
function point(element, group, at) {
  const item = element.querySelector(`[data-example="${CSS.escape(`${group}/${at}`)}"]`);
  if (!item) return;
  element.querySelectorAll(".pointed").forEach((other) => other.classList.remove("pointed"));
  item.closest("details")?.setAttribute("open", "");
  item.classList.add("pointed");
  item.scrollIntoView({ block: "center" });
}

function content(dashboard, latent, { order, labels, query }) {
  const side = [
    activations(latent),
    outputs(latent),
    others(dashboard, "Neighbours", "cosine of the decoder rows", latent.neighbours, labels, query),
    others(
      dashboard,
      "Fires together with",
      "Jaccard index of the tokens",
      latent.coactive,
      labels,
      query,
    ),
    neurons(latent),
  ];
  return [
    heading(dashboard, latent, { order, labels, query }),
    h(
      "div",
      { class: "columns" },
      h("div", {}, explanations(latent), examples(dashboard, latent, query)),
      h("aside", {}, side),
    ),
  ];
}

function heading(dashboard, latent, { order, labels, query }) {
  const { index } = latent;
  const place = order.indexOf(index);
  const [before, after] = beside(order, index, dashboard.about.d_sae);
  const step = (id, text, name, to) =>
    h(
      "a",
      {
        id,
        class: "button",
        href: to === null ? null : dashboard.latentAddress(to, query),
        "aria-disabled": to === null ? "true" : null,
        title: to === null ? null : `latent ${to}`,
        "aria-label": name,
      },
      text,
    );
  const copy = button(
    "copy link",
    async () => {
      const address = `${location.href.split("#")[0]}#/latent/${index}`;
      try {
        await navigator.clipboard.writeText(address);
        copy.textContent = "copied";
      } catch {
        copy.textContent = "the address bar has it"; // only https and this computer may copy
      }
      setTimeout(() => (copy.textContent = "copy link"), 2000);
    },
    { id: "copy" },
  );
  const { can } = dashboard.about;
  const { density } = latent;
  const facts = [
    [
      "fires on",
      percent(density),
      density > 0 ? `of tokens, 1 in ${count(Math.round(1 / density))}` : "of tokens",
    ],
    ["maximum", number(latent.max), ""],
    ["mean when on", number(latent.mean), ""],
    ["score", latent.score === null ? null : number(latent.score), ""],
  ].filter(([, value]) => value !== null);
  return h(
    "header",
    { class: "heading" },
    h(
      "div",
      { class: "bar" },
      h("h1", {}, `Latent ${index}`),
      h(
        "div",
        { class: "actions" },
        step("previous", "←", "Previous latent", before),
        step("next", "→", "Next latent", after),
        place < 0
          ? null
          : h("span", { class: "soft" }, `${count(place + 1)} of ${count(order.length)}`),
        copy,
        can.generate
          ? steerLink(dashboard, index)
          : null,
      ),
    ),
    h(
      "p",
      { class: latent.label ? "label" : "label soft", dir: "auto" },
      latent.label || `peaks on ${labels.of(index) || "nothing"}`,
    ),
    h(
      "dl",
      { class: "facts" },
      facts.map(([name, value, more]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, value), ` ${more}`)),
      ),
    ),
  );
}

/** A link to the live panel as it is left, with one latent more; made anew when it is followed. */
function steerLink(dashboard, index) {
  const link = h("a", { class: "button", href: dashboard.steerAddress(index) }, "steer with it");
  link.addEventListener("click", () => (link.href = dashboard.steerAddress(index)));
  return link;
}

function examples(dashboard, latent, query) {
  const { about } = dashboard;
  const empty = latent.groups.every((group) => group.length === 0);
  const legend = h(
    "p",
    { class: "legend soft", hidden: true },
    "Taken out at every position, the latent changes how probable a token is; the line is under " +
      "the token predicted: ",
    h("span", { class: "piece helped key" }, "blue, the latent helped"),
    ", ",
    h("span", { class: "piece hurt key" }, "red and dashed, it hurt"),
    ". The thicker, the more, within one text.",
  );
  const lists = latent.groups.map((group, g) => {
    const items = group.map((one, e) => {
      const item = exampleItem(latent, one, {
        address: dashboard.latentAddress(`${latent.index}/example/${g}/${e}`, query),
        ablatable: about.can.ablate,
        onAblated: () => (legend.hidden = false),
      });
      item.dataset.example = `${g}/${e}`;
      return item;
    });
    const name = about.groups[g]?.name ?? `group ${g}`;
    if (g === 0 || items.length === 0)
      return h("ol", { class: "examples", "aria-label": name }, items);
    return h(
      "details",
      { class: "interval" },
      h("summary", {}, name, h("span", { class: "soft" }, ` ${items.length}`)),
      h("ol", { class: "examples", "aria-label": name }, items),
    );
  });
  const [top, ...intervals] = lists;
  const sampled = latent.groups.slice(1).some((group) => group.length);
  return h(
    "section",
    { class: "shown" },
    h("h2", {}, "Where it fires highest"),
    empty
      ? h(
          "p",
          { class: "message soft" },
          `It did not fire on the ${count(about.rows)} tokens looked at.`,
        )
      : h(
          "p",
          { class: "soft" },
          "The deeper the shade, the closer to the latent's maximum; the peak is outlined. Point " +
            "at, tap or go along the tokens for each one's own activation. ↵ is a new line.",
        ),
    legend,
    top,
    sampled
      ? h(
          "div",
          { class: "bar" },
          h("h2", {}, "At lower strengths"),
          button("open all", (event) => {
            const all = [...event.target.closest("section").querySelectorAll("details")];
            const open = !all.every((one) => one.open);
            all.forEach((one) => (one.open = open));
            event.target.textContent = open ? "close all" : "open all";
          }),
        )
      : null,
    sampled ? intervals : null,
  );
}

function activations(latent) {
  if (!latent.histogram.some((n) => n > 0)) return null;
  return h(
    "section",
    {},
    h("h2", {}, "Activations"),
    histogram(latent.histogram, 0, latent.max, {
      caption: "Activations above zero (heights logarithmic)",
      what: "tokens",
    }),
  );
}

function outputs(latent) {
  if (!latent.promoted && !latent.suppressed) return null;
  const spread = latent.logit_histogram;
  return h(
    "section",
    {},
    h("h2", {}, "Tokens it promotes and suppresses"),
    diverging([...(latent.promoted ?? []), ...(latent.suppressed ?? [])]),
    spread
      ? histogram(spread.counts, spread.low, spread.high, {
          caption: "Logit weights of all tokens (heights logarithmic)",
          what: "tokens",
          zero: true,
        })
      : null,
  );
}

function others(dashboard, title, what, list, labels, query) {
  if (!list?.length) return null;
  return h(
    "section",
    {},
    h("h2", {}, title),
    h("p", { class: "soft" }, what),
    h(
      "ul",
      { class: "links" },
      list.map(([index, value]) =>
        h(
          "li",
          {},
          h(
            "a",
            { href: dashboard.latentAddress(index, query) },
            h("span", { class: "number" }, index),
            h(
              "span",
              { class: labels.isHint(index) ? "name hint" : "name", dir: "auto" },
              labels.of(index),
            ),
            h("span", { class: "value" }, number(value, 2)),
          ),
        ),
      ),
    ),
  );
}

function neurons(latent) {
  if (!latent.neurons?.length) return null;
  return h(
    "section",
    {},
    h("h2", {}, "Correlated neurons"),
    h("p", { class: "soft" }, "Pearson's correlation over tokens"),
    h(
      "ul",
      { class: "links" },
      latent.neurons.map(([index, value]) =>
        h(
          "li",
          {},
          h("span", { class: "number" }, index),
          h("span", { class: "name" }),
          h("span", { class: "value" }, number(value, 2)),
        ),
      ),
    ),
  );
}
