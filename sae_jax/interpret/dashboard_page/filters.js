// What is above the list: the search, the filters, and the heads of the columns, which sort.

import { button, h } from "./dom.js";
import { COLUMNS, settings } from "./order.js";

const PAUSE = 150; // milliseconds of no typing before a search
const NAMES = {
  latent: "latent",
  density: "fires on",
  max: "maximum",
  mean: "mean",
  score: "score",
  label: "label, or tokens at its peaks",
};
const RANGE_NAMES = { density: "fires on, % of tokens", max: "maximum", score: "score" };

/**
 * The search and the filters; `change` is told the new settings by name. Its `fill` shows those of
 * an address's query, its `focusSearch` goes to the search.
 */
export function filters(ranges, change, explained) {
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "search, or a number",
    "aria-label": "Search; a number and Enter opens that latent",
    autocomplete: "off",
    spellcheck: "false",
  });
  const where = h(
    "select",
    { id: "where", "aria-label": "Where to search" },
    h("option", { value: "" }, explained ? "in explanations and peaks" : "in labels and peaks"),
    h("option", { value: "examples" }, "in examples too"),
  );
  const alive = h("input", { type: "checkbox", id: "alive" });
  const bounds = ranges.map((name) => {
    const [low, high] = ["low", "high"].map((end) =>
      h("input", {
        type: "number",
        step: "any",
        inputmode: "decimal",
        placeholder: end === "low" ? "from" : "to",
        id: `${name}-${end}`,
        "aria-label": `${RANGE_NAMES[name]}, ${end === "low" ? "at least" : "at most"}`,
      }),
    );
    const text = () => (low.value || high.value ? `${low.value}..${high.value}` : "");
    for (const input of [low, high])
      input.addEventListener("change", () => change({ [name]: text() }));
    return { name, low, high };
  });
  const more = h(
    "details",
    { class: "more" },
    h("summary", { class: "button" }, "filters"),
    h(
      "div",
      { class: "ranges" },
      bounds.map(({ name, low, high }) =>
        h("fieldset", {}, h("legend", {}, RANGE_NAMES[name]), low, high),
      ),
      button("clear", () => change(Object.fromEntries(ranges.map((name) => [name, ""])))),
    ),
  );
  document.addEventListener("click", ({ target }) => {
    if (!more.contains(target)) more.open = false;
  });
  more.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape") return;
    more.open = false;
    more.firstElementChild.focus();
  });
  const element = h(
    "div",
    { class: "filters", role: "search" },
    search,
    where,
    h("label", { class: "check" }, alive, "alive only"),
    more,
    button(
      "shuffle",
      () => change({ sort: "random", seed: String(1 + Math.floor(Math.random() * 1e6)) }),
      {
        id: "shuffle",
        title: "A random order: a sample without a bias",
      },
    ),
  );
  let timer = 0;
  const searched = () => change({ q: search.value, in: where.value });
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(searched, PAUSE);
  });
  where.addEventListener("change", searched);
  alive.addEventListener("change", () => change({ dead: alive.checked ? "" : "1" }));
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    clearTimeout(timer);
    const [, latent] = search.value.trim().match(/^#?(\d+)$/) ?? [];
    if (latent === undefined) return searched();
    search.value = "";
    change({ q: "" });
    location.hash = `#/latent/${latent}`;
  });
  element.fill = (query) => {
    const wanted = settings(query);
    if (document.activeElement !== search) search.value = query.get("q") ?? "";
    where.value = wanted.everywhere ? "examples" : "";
    alive.checked = !wanted.dead;
    for (const { name, low, high } of bounds) {
      const { low: from, high: to } = wanted.ranges[name];
      low.value = from > -Infinity ? from : "";
      high.value = to < Infinity ? to : "";
    }
    const active = bounds.filter(({ low, high }) => low.value || high.value).length;
    more.firstElementChild.textContent = active ? `filters (${active})` : "filters";
  };
  element.focusSearch = () => search.select();
  return element;
}

/** The heads of the columns; `mark` shows which one the list is sorted by. */
export function header(columns, change) {
  let sort = "latent";
  const cells = columns.map((name) => {
    const click = () => {
      const first = COLUMNS[name];
      const other = first.startsWith("-") ? name : `-${name}`;
      change({ sort: sort === first ? other : first, seed: "" });
    };
    return h("span", { role: "columnheader", class: name }, button(NAMES[name], click));
  });
  const row = h("div", { role: "row", class: "row head", "aria-rowindex": 1 }, cells);
  row.mark = (wanted) => {
    sort = wanted;
    columns.forEach((name, i) => {
      const own = sort.replace(/^-/, "") === name;
      const direction = sort.startsWith("-") ? "descending" : "ascending";
      cells[i].setAttribute("aria-sort", own ? direction : "none");
    });
  };
  return row;
}
