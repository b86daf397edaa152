// The model itself: which latents fire on texts that are typed, and what it says with some of them
// held at other strengths. All settings are in the address, so that a link shows the same.

import { ask, Labels } from "./data.js";
import { announce, button, count, failure, h, number } from "./dom.js";
import { shade, text } from "./texts.js";
import { hideTip } from "./tips.js";

const MOST_LATENTS = 50;
const REACH = 10; // of a clamp, in maxima
const NEW_TOKENS = 40;

/** The view of the live panel; `dashboard` is what app.js shares with all views. */
export function liveView(dashboard) {
  const { can } = dashboard.about;
  const reading = can.encode ? readingPanel(dashboard, (latent) => steering?.add(latent)) : null;
  const steering = can.generate ? steeringPanel(dashboard) : null;
  const element = h(
    "div",
    { class: "view live" },
    h("h1", { class: "visually-hidden" }, "Live"),
    reading?.element,
    steering?.element,
  );
  return {
    element,
    async show({ query }) {
      dashboard.keepLive(query);
      reading?.fill(query);
      steering?.fill(query);
      return "Live";
    },
  };
}

/** Writes settings into the address, in place of those of the same names. */
function remember(dashboard, names, pairs) {
  const query = dashboard.query();
  names.forEach((name) => query.delete(name));
  pairs.forEach(([name, value]) => query.append(name, value));
  history.replaceState(null, "", `#/live?${query}`);
  dashboard.keepLive(query);
}

/** A list of boxes for texts, with buttons for more and for fewer; Enter in one is `submit`. */
function boxes(name, more, least, submit) {
  const list = h("div", { class: "boxes" });
  const add = (value = "") => {
    const box = h("textarea", { rows: 1, "aria-label": name, spellcheck: "false", dir: "auto", enterkeyhint: "go" });
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
    element: h("div", {}, list, button(more, () => add().focus())),
    get: () => all().map((box) => box.value).filter((value) => value.trim()),
    set(values) {
      list.replaceChildren();
      for (let i = 0; i < Math.max(least, values.length); i++) add(values[i]);
    },
  };
}

function readingPanel(dashboard, clamp) {
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
    h("p", { class: "soft" }, "Of several texts, the latents that fire in each; in none of the texts without it."),
    positives.element,
    negatives.element,
    h("div", { class: "bar" }, h("label", {}, "sorted by ", sort), send),
  );
  let asked = null;

  async function run() {
    const texts = positives.get();
    if (!texts.length) {
      result.replaceChildren(h("p", { class: "soft" }, "Type a text first."));
      return;
    }
    const request = { texts, negatives: negatives.get(), top: MOST_LATENTS, sort: sort.value };
    const mine = (asked = JSON.stringify(request));
    send.disabled = true;
    send.textContent = "reading …";
    try {
      const answer = await ask("encode", request);
      const labels = await dashboard.labels.catch(() => new Labels(dashboard.about.d_sae));
      if (mine === asked) result.replaceChildren(...found(dashboard, answer, labels, clamp));
    } catch (error) {
      asked = null;
      result.replaceChildren(failure(error, run));
    } finally {
      send.disabled = false;
      send.textContent = "Show latents";
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    remember(dashboard, ["t", "not", "by"], [
      ...positives.get().map((value) => ["t", value]),
      ...negatives.get().map((value) => ["not", value]),
      ...(sort.value === "max" ? [] : [["by", sort.value]]),
    ]);
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

/** What the server found: the texts, the latents of a token, and those of all the texts. */
function found(dashboard, answer, labels, clamp) {
  const nameOf = (latent) => labels.of(latent);
  const lines = answer.texts.map(({ pieces, stops, tokens }, t) => {
    const at = (piece) => (piece === 0 ? 0 : stops[piece - 1]);
    const own = text(pieces, pieces.map(() => 0), (piece) => {
      const here = strongest(tokens, at(piece), stops[piece]);
      return here.length
        ? h("table", {}, here.map(([latent, value]) =>
            h("tr", {}, h("th", { scope: "row" }, latent), h("td", { class: "name", dir: "auto" }, nameOf(latent)), h("td", {}, number(value)))))
        : h("span", {}, "no latent fires here");
    });
    const pin = (piece) => {
      const here = strongest(tokens, at(piece), stops[piece]);
      token.replaceChildren(
        h("h3", {}, "On ", h("span", { class: "chip", dir: "auto" }, pieces[piece])),
        here.length
          ? table(dashboard, here.map(([index, value]) => ({ index, max: value, label: nameOf(index) })), clamp)
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
    h("div", { class: "texts" }, lines.map(({ line }) => line)),
    shading,
    token,
    h("h3", {}, answer.texts.length > 1 ? "In all of the texts" : "In the text"),
    answer.latents.length
      ? table(dashboard, answer.latents.map((one) => ({ ...one, label: one.label || nameOf(one.index) })), clamp, show)
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

function table(dashboard, latents, clamp, onPoint) {
  const largest = Math.max(1e-30, ...latents.map(({ max }) => max));
  const row = (latent) => {
    const item = h(
      "li",
      {},
      h("a", { class: "number", href: `#/latent/${latent.index}` }, latent.index),
      h("span", { class: "name", dir: "auto" }, latent.label ?? ""),
      h("span", { class: "max" }, h("span", { class: "meter", share: latent.max / largest }), h("span", { class: "value" }, number(latent.max))),
      dashboard.about.can.generate
        ? button("clamp", () => clamp(latent.index), { "aria-label": `Clamp latent ${latent.index}` })
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

function field(name, properties) {
  const input = h("input", { type: "number", ...properties });
  return { input, element: h("label", { class: "field" }, name, input) };
}

function steeringPanel(dashboard) {
  const clamps = new Map(); // from latent to factor
  const form = h("form", {});
  const list = h("ul", { class: "clamps" });
  const prompt = h("textarea", { rows: 2, id: "prompt", "aria-label": "Prompt", spellcheck: "false", dir: "auto" });
  const temperature = field("temperature", { min: 0, max: 5, step: 0.1, id: "temperature" });
  const seed = field("seed", { min: 0, step: 1, id: "seed" });
  const tokens = field("new tokens", { min: 1, max: 500, step: 1, id: "new-tokens" });
  const number_ = h("input", { type: "number", min: 0, max: dashboard.about.d_sae - 1, step: 1, placeholder: "latent", "aria-label": "Number of a latent to clamp" });
  const send = h("button", { class: "primary", id: "continue" }, "Continue");
  const result = h("div", { class: "result", "aria-live": "polite" });

  const save = () =>
    remember(dashboard, ["clamp", "p", "temperature", "seed", "tokens"], [
      ...[...clamps].map(([latent, factor]) => ["clamp", `${latent}:${factor}`]),
      ["p", prompt.value],
      ["temperature", temperature.input.value],
      ["seed", seed.input.value],
      ["tokens", tokens.input.value],
    ]);
  const slider = (latent, factor, labels) => {
    const written = h("output", { class: "value" }, `${factor} × max`);
    const input = h("input", { type: "range", min: -REACH, max: REACH, step: 0.5, "aria-label": `Factor of latent ${latent}` });
    input.value = factor;
    input.addEventListener("input", () => {
      clamps.set(latent, Number(input.value));
      written.textContent = `${input.value} × max`;
    });
    input.addEventListener("change", save);
    const remove = button("×", () => {
      clamps.delete(latent);
      draw();
      save();
    }, { "aria-label": `Let latent ${latent} be` });
    return h(
      "li",
      {},
      h("a", { class: "number", href: `#/latent/${latent}` }, latent),
      h("span", { class: "name", dir: "auto" }, labels?.of(latent) ?? ""),
      input,
      written,
      remove,
    );
  };
  let labels = null;
  const draw = () => {
    list.replaceChildren(
      ...(clamps.size
        ? [...clamps].map(([latent, factor]) => slider(latent, factor, labels))
        : [h("li", { class: "soft" }, dashboard.about.can.encode ? "None yet: choose one of a text's latents, or add it by its number." : "None yet: add one by its number.")]),
    );
  };
  dashboard.labels.then((loaded) => {
    labels = loaded;
    draw();
  }).catch(() => {}); // the list of latents says that there are none

  async function run() {
    send.disabled = true;
    send.textContent = "writing …";
    const began = performance.now();
    try {
      const answer = await ask("generate", {
        prompt: prompt.value,
        clamps: [...clamps].map(([latent, factor]) => ({ latent, factor })),
        max_new_tokens: Number(tokens.input.value),
        temperature: Number(temperature.input.value),
        seed: Number(seed.input.value),
      });
      const seconds = number((performance.now() - began) / 1000, 2);
      const side = (name, written, id) =>
        h("figure", {}, h("figcaption", {}, name), h("p", { class: "text", dir: "auto", id }, h("span", { class: "soft" }, prompt.value), written));
      result.replaceChildren(
        h("div", { class: "sides" }, side("as it is", answer.clean, "clean"), side("steered", answer.steered, "steered")),
        h("p", { class: "soft" }, answer.clean === answer.steered ? "No difference. " : "", `${seconds} s`),
      );
    } catch (error) {
      result.replaceChildren(failure(error, run));
    } finally {
      send.disabled = false;
      send.textContent = "Continue";
    }
  }

  const add = (latent, factor = 5) => {
    clamps.set(latent, clamps.get(latent) ?? factor);
    draw();
    save();
    hideTip();
    form.scrollIntoView({ block: "nearest" });
    announce(`Latent ${latent} is clamped to ${clamps.get(latent)} times its maximum`);
  };
  const addTyped = () => {
    if (number_.value === "" || !number_.reportValidity()) return;
    add(Number(number_.value));
    number_.value = "";
  };
  number_.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    addTyped();
  });
  form.append(
    h("h2", {}, "Hold latents, and read on"),
    h("p", { class: "soft" }, "A latent is held at a multiple of its maximum, at every token; 0 takes it out. What the dictionary does not explain is kept."),
    list,
    h("div", { class: "bar" }, number_, button("add", addTyped)),
    h("label", { for: "prompt" }, "Prompt"),
    prompt,
    h("div", { class: "bar" }, temperature.element, seed.element, tokens.element, send),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    save();
    run();
  });
  let filled = null;
  return {
    element: h("section", { class: "panel" }, form, result),
    add,
    fill(query) {
      const own = String(query);
      if (own === filled) return;
      filled = own;
      clamps.clear();
      for (const pair of query.getAll("clamp")) {
        const [latent, factor] = pair.split(":").map(Number);
        if (Number.isInteger(latent) && latent >= 0 && latent < dashboard.about.d_sae && Number.isFinite(factor)) clamps.set(latent, factor);
      }
      prompt.value = query.get("p") ?? "";
      temperature.input.value = query.get("temperature") ?? 0;
      seed.input.value = query.get("seed") ?? 0;
      tokens.input.value = query.get("tokens") ?? NEW_TOKENS;
      draw();
    },
  };
}
