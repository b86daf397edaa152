// Which latents fire on texts that are typed, in all of some and in none of others.

import { ask, Labels } from "./data.js";
import { announce, button, failure, h, number, percent } from "./dom.js";
import { shade, text } from "./texts.js";

const FEW = 20; // latents that are shown at first
const MANY = 200;

/** The panel; `clamp` is told of a latent that is to be held. */
export function readingPanel(dashboard, clamp) {
  const form = h("form", {});
  const submit = () => form.requestSubmit();
  const positives = boxes("text", "+ another text", 1, submit);
  const negatives = boxes("negative text", "+ a text without it", 0, submit);
  const sort = h(
    "select",
    { id: "live-sort" },
    h("option", { value: "max" }, "the highest activation"),
    h("option", { value: "mean" }, "the mean activation"),
    h("option", { value: "frequency" }, "the share of tokens"),
  );
  const send = h("button", { class: "primary" }, "Show latents");
  const result = h("div", { class: "result", "aria-live": "polite" });
  form.append(
    h("h2", {}, "Latents of a text"),
    h(
      "p",
      { class: "soft" },
      "Of several texts, the latents that fire in each; in none of the texts without it.",
    ),
    positives.element,
    negatives.element,
    h("div", { class: "bar" }, h("label", {}, "sorted by ", sort), send),
  );
  let asked = null;

  async function run(top = FEW) {
    const texts = positives.get();
    if (!texts.length) {
      result.replaceChildren(h("p", { class: "soft" }, "Type a text first."));
      return;
    }
    const request = { texts, negatives: negatives.get(), top, sort: sort.value };
    const mine = (asked = JSON.stringify(request));
    send.disabled = true;
    send.textContent = "reading …";
    try {
      const answer = await ask("encode", request);
      const labels = await dashboard.labels.catch(() => new Labels(dashboard.about.d_sae));
      const by = request.sort === "frequency" ? percent : number;
      if (mine !== asked) return;
      result.replaceChildren(...found(dashboard, answer, labels, by, clamp));
      if (answer.latents.length === FEW) result.append(button("show more", () => run(MANY)));
    } catch (error) {
      asked = null;
      result.replaceChildren(failure(error, () => run(top)));
    } finally {
      send.disabled = false;
      send.textContent = "Show latents";
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dashboard.keepInAddress(
      ["t", "not", "by"],
      [
        ...positives.get().map((value) => ["t", value]),
        ...negatives.get().map((value) => ["not", value]),
        ...(sort.value === "max" ? [] : [["by", sort.value]]),
      ],
    );
    run();
  });
  sort.addEventListener("change", () => positives.get().length && submit());
  let filled = null;
  return {
    element: h("section", { class: "panel" }, form, result),
    fill(query) {
      const own = JSON.stringify([query.getAll("t"), query.getAll("not"), query.get("by")]);
      if (own === filled) return;
      filled = own;
      positives.set(query.getAll("t"));
      negatives.set(query.getAll("not"));
      sort.value = ["mean", "frequency"].includes(query.get("by")) ? query.get("by") : "max";
      if (query.has("t")) run();
    },
  };
}

/**
 * What the server found: the texts, the latents of a token, and those of all the texts. `by` writes
 * what they are sorted by.
 */
function found(dashboard, answer, labels, by, clamp) {
  const nameOf = (latent) => labels.of(latent);
  const lines = answer.texts.map(({ pieces, stops, tokens }, t) => {
    const at = (piece) => (piece === 0 ? 0 : stops[piece - 1]);
    const own = text(
      pieces,
      pieces.map(() => 0),
      (piece) => {
        const here = strongest(tokens, at(piece), stops[piece]);
        return here.length
          ? h(
              "table",
              {},
              here.map(([latent, value]) =>
                h(
                  "tr",
                  {},
                  h("th", { scope: "row" }, latent),
                  h("td", { class: "name", dir: "auto" }, nameOf(latent)),
                  h("td", {}, number(value)),
                ),
              ),
            )
          : h("span", {}, "no latent fires here");
      },
    );
    const pin = (piece) => {
      const here = strongest(tokens, at(piece), stops[piece]);
      token.replaceChildren(
        h("h3", {}, "On ", h("span", { class: "chip", dir: "auto" }, pieces[piece])),
        here.length
          ? table(
              dashboard,
              here.map(([index, score]) => ({ index, score })),
              nameOf,
              number,
              clamp,
            )
          : h("p", { class: "soft" }, "No latent fires here."),
      );
    };
    own.spans.forEach((span, piece) => span.addEventListener("click", () => pin(piece)));
    own.line.addEventListener("keydown", (event) => {
      const piece = own.spans.indexOf(document.activeElement);
      if (event.key === "Enter" && piece >= 0) pin(piece);
    });
    own.show = (latent) =>
      own.spans.forEach((span, piece) => {
        const values = latent.values[t].slice(at(piece), stops[piece]);
        shade(span, Math.max(0, ...values) / (dashboard.index.max[latent.index] || latent.max));
      });
    own.line.setAttribute("aria-label", `Text: ${pieces.join("")}`);
    return own;
  });
  const shading = h("p", { class: "soft" });
  const show = (latent) => {
    lines.forEach((line) => line.show(latent));
    shading.replaceChildren(
      "Shaded by latent ",
      h("a", { href: `#/latent/${latent.index}` }, latent.index),
      ", relative to its maximum. Point at a row below for another; click a token for its own latents.",
    );
  };
  const token = h("div", { class: "token" });
  if (answer.latents.length) show(answer.latents[0]);
  announce(`${answer.latents.length} latents`);
  return [
    h(
      "div",
      { class: "texts" },
      lines.map(({ line }) => line),
    ),
    shading,
    token,
    h("h3", {}, answer.texts.length > 1 ? "In all of the texts" : "In the text"),
    answer.latents.length
      ? table(dashboard, answer.latents, nameOf, by, clamp, show)
      : h("p", { class: "soft" }, "No latent fires in all of the texts and in none of the others."),
  ];
}

/** The latents on a piece, each at its strongest token, the strongest first. */
function strongest(tokens, start, stop) {
  const best = new Map();
  for (const [latent, value] of tokens.slice(start, stop).flat()) {
    best.set(latent, Math.max(value, best.get(latent) ?? 0));
  }
  return [...best].sort(([, a], [, b]) => b - a);
}

/** Latents with their scores, as bars; `onPoint` is told of the one that is pointed at. */
function table(dashboard, latents, nameOf, by, clamp, onPoint) {
  const largest = Math.max(1e-30, ...latents.map(({ score }) => score));
  const row = (latent) => {
    const item = h(
      "li",
      {},
      h("a", { class: "number", href: `#/latent/${latent.index}` }, latent.index),
      h("span", { class: "name", dir: "auto" }, nameOf(latent.index)),
      h(
        "span",
        { class: "max" },
        h("span", { class: "meter", share: latent.score / largest }),
        h("span", { class: "value" }, by(latent.score)),
      ),
      dashboard.about.can.generate
        ? button("clamp", () => clamp(latent.index), {
            "aria-label": `Clamp latent ${latent.index}`,
          })
        : null,
    );
    for (const event of onPoint ? ["pointerenter", "focusin", "click"] : []) {
      item.addEventListener(event, () => onPoint(latent));
    }
    item.dataset.latent = latent.index;
    return item;
  };
  return h("ol", { class: "active" }, latents.map(row));
}

/** A list of boxes for texts, with buttons for more and for fewer; Enter in one is `submit`. */
function boxes(name, more, least, submit) {
  const list = h("div", { class: "boxes" });
  const add = (value = "") => {
    const box = h("textarea", {
      rows: 1,
      "aria-label": name,
      spellcheck: "false",
      dir: "auto",
      enterkeyhint: "go",
    });
    box.value = value;
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
    const row = h("div", { class: "box" }, box);
    if (list.children.length >= least) {
      row.append(button("×", () => row.remove(), { "aria-label": `Remove this ${name}` }));
    }
    list.append(row);
    return box;
  };
  const all = () => [...list.querySelectorAll("textarea")];
  return {
    element: h(
      "div",
      {},
      list,
      button(more, () => add().focus()),
    ),
    get: () =>
      all()
        .map((box) => box.value)
        .filter((value) => value.trim()),
    set(values) {
      list.replaceChildren();
      for (let i = 0; i < Math.max(least, values.length); i++) add(values[i]);
    },
  };
}
