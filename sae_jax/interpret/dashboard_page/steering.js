// What the model says with some latents held at multiples of their maxima, beside what it says.

import { ask } from "./data.js";
import { announce, button, failure, h, number } from "./dom.js";
import { hideTip } from "./tips.js";

const REACH = 10; // of a clamp, in maxima
const NEW_TOKENS = 40;

function field(name, properties) {
  const input = h("input", { type: "number", ...properties });
  return { input, element: h("label", { class: "field" }, name, input) };
}

/** The panel; its `add` clamps a latent. */
export function steeringPanel(dashboard) {
  const clamps = new Map(); // from latent to factor
  const form = h("form", {});
  const list = h("ul", { class: "clamps" });
  const prompt = h("textarea", {
    rows: 2,
    id: "prompt",
    "aria-label": "Prompt",
    spellcheck: "false",
    dir: "auto",
  });
  const temperature = field("temperature", { min: 0, max: 5, step: 0.1, id: "temperature" });
  const seed = field("seed", { min: 0, step: 1, id: "seed" });
  const tokens = field("new tokens", { min: 1, max: 400, step: 1, id: "new-tokens" });
  const byNumber = h("input", {
    type: "number",
    min: 0,
    max: dashboard.about.d_sae - 1,
    step: 1,
    placeholder: "latent",
    "aria-label": "Number of a latent to clamp",
  });
  const send = h("button", { class: "primary", id: "continue" }, "Continue");
  const result = h("div", { class: "result", "aria-live": "polite" });

  const save = () =>
    dashboard.keepInAddress(
      ["clamp", "p", "temperature", "seed", "tokens"],
      [
        ...[...clamps].map(([latent, factor]) => ["clamp", `${latent}:${factor}`]),
        ["p", prompt.value],
        ["temperature", temperature.input.value],
        ["seed", seed.input.value],
        ["tokens", tokens.input.value],
      ],
    );
  const slider = (latent, factor, labels) => {
    const written = h("output", { class: "value" }, `${factor} × max`);
    const input = h("input", {
      type: "range",
      min: -REACH,
      max: REACH,
      step: 0.5,
      "aria-label": `Factor of latent ${latent}`,
    });
    input.value = factor;
    input.addEventListener("input", () => {
      clamps.set(latent, Number(input.value));
      written.textContent = `${input.value} × max`;
    });
    input.addEventListener("change", save);
    const remove = button(
      "×",
      () => {
        clamps.delete(latent);
        draw();
        save();
      },
      { "aria-label": `Let latent ${latent} be` },
    );
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
        : [
            h(
              "li",
              { class: "soft" },
              dashboard.about.can.encode
                ? "None yet: choose one of a text's latents, or add it by its number."
                : "None yet: add one by its number.",
            ),
          ]),
    );
  };
  dashboard.labels
    .then((loaded) => {
      labels = loaded;
      draw();
    })
    .catch(() => {}); // the list of latents says that there are none

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
        h(
          "figure",
          {},
          h("figcaption", {}, name),
          h(
            "p",
            { class: "text", dir: "auto", id },
            h("span", { class: "soft" }, prompt.value),
            written,
          ),
        );
      result.replaceChildren(
        h(
          "div",
          { class: "sides" },
          side("as it is", answer.clean, "clean"),
          side("steered", answer.steered, "steered"),
        ),
        h(
          "p",
          { class: "soft" },
          answer.clean === answer.steered ? "No difference. " : "",
          `${seconds} s`,
        ),
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
    if (byNumber.value === "" || !byNumber.reportValidity()) return;
    add(Number(byNumber.value));
    byNumber.value = "";
  };
  byNumber.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    addTyped();
  });
  form.append(
    h("h2", {}, "Hold latents, and read on"),
    h(
      "p",
      { class: "soft" },
      "A latent is held at a multiple of its maximum, at every token; 0 takes it out. What the dictionary does not explain is kept.",
    ),
    list,
    h("div", { class: "bar" }, byNumber, button("add", addTyped)),
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
        if (
          Number.isInteger(latent) &&
          latent >= 0 &&
          latent < dashboard.about.d_sae &&
          Number.isFinite(factor)
        )
          clamps.set(latent, factor);
      }
      prompt.value = query.get("p") ?? "";
      temperature.input.value = query.get("temperature") ?? 0;
      seed.input.value = query.get("seed") ?? 0;
      tokens.input.value = query.get("tokens") ?? NEW_TOKENS;
      draw();
    },
  };
}
