// The list of all latents. Only the rows that are seen exist as elements.

import { announce, button, count, failure, h, number, percent } from "./dom.js";
import { filters, header } from "./filters.js";
import { COLUMNS, listQuery, RANGES, settings } from "./order.js";

const TALLEST = 8e6; // pixels; browsers lay out nothing much taller, and then scrolling is scaled

/** The view of the list; `dashboard` is what app.js shares with all views. */
export function listView(dashboard) {
  const { about, index } = dashboard;
  const has = { score: index.score.some((value) => !Number.isNaN(value)) };
  const columns = Object.keys(COLUMNS).filter((name) => has[name] ?? true);
  const ranges = RANGES.filter((name) => has[name] ?? true);
  let query = new URLSearchParams();
  let request = null; // the last list that was asked for: one that comes late is not shown

  const change = (changes) => {
    const next = new URLSearchParams(query);
    for (const [key, value] of Object.entries(changes)) {
      if (value) next.set(key, value);
      else next.delete(key);
    }
    dashboard.replace(dashboard.listAddress(next));
  };
  const controls = filters(ranges, change, about.explained);
  const head = header(columns, change);
  const table = rows(dashboard, columns);
  const shown = h("span", { class: "soft", role: "status", id: "shown" });
  const empty = h("div", { class: "message", hidden: true });
  controls.append(shown);
  const element = h(
    "div",
    { class: "list" },
    h("h1", { class: "visually-hidden" }, `All latents of ${about.title}`),
    controls,
    h(
      "div",
      {
        class: has.score ? "table scored" : "table",
        role: "table",
        "aria-label": "Latents",
        "aria-rowcount": about.d_sae + 1,
      },
      head,
      table.element,
    ),
    empty,
  );

  const say = (content) => {
    empty.hidden = content === null;
    element.querySelector(".table").hidden = content !== null;
    empty.replaceChildren(...(content === null ? [] : [content]));
  };

  async function show(route) {
    query = route.query;
    const mine = (request = {});
    const wanted = settings(query);
    controls.fill(query);
    head.mark(wanted.sort);
    const slow = setTimeout(() => (shown.textContent = "searching …"), 100);
    try {
      const list = await dashboard.list(query);
      if (mine !== request) return null;
      const of = `of ${count(about.d_sae)} latents`;
      shown.textContent = `${count(list.length)} ${of}`;
      table.show(list, listQuery(query));
      say(list.length ? null : nothing(wanted, about, () => dashboard.replace("#/")));
    } catch (error) {
      if (mine !== request) return null;
      shown.textContent = "";
      say(failure(error, () => show(route)));
    } finally {
      clearTimeout(slow);
    }
    return "";
  }

  dashboard.labels.then(table.refresh).catch((error) => {
    announce(error.message);
    controls.append(h("span", { class: "failed" }, `Without labels: ${error.message}`));
  });
  return { element, show, focusSearch: controls.focusSearch };
}

function nothing(wanted, about, clear) {
  const where = about.can.search ? "examples" : "best examples, at and just before the peak,";
  const why = wanted.text
    ? `No label${about.explained ? ", no explanation" : ""}${wanted.everywhere ? ` and none of the ${where}` : ""} has “${wanted.text}”, within the other filters.`
    : "No latent passes these filters.";
  return h("div", {}, h("p", {}, why), button("Show all latents", clear));
}

/** The rows: a pool of elements, each for every so-many-th latent of the list. */
function rows(dashboard, columns) {
  const { index } = dashboard;
  const body = h("div", { class: "window" });
  const spacer = h("div", { class: "spacer" }, body);
  const element = h(
    "div",
    {
      class: "scroller",
      tabindex: "0",
      role: "rowgroup",
      "aria-label": "Latents; arrows go along",
    },
    spacer,
  );
  const bar = logBar(index.density);
  const strength = logBar(index.max);
  let labels = null;
  let list = new Uint32Array();
  let shownKey = null;
  let scrolledTo = 0;
  let pool = [];

  function make() {
    const cells = Object.fromEntries(
      columns.map((name) => [name, h("span", { role: "cell", class: name })]),
    );
    const link = h("a", { tabindex: "-1" });
    cells.latent.append(link);
    const density = meter(cells.density);
    const max = meter(cells.max);
    const row = h("div", { role: "row", class: "row" }, Object.values(cells));
    const set = (position) => {
      const latent = list[position];
      row.position = position;
      row.setAttribute("aria-rowindex", position + 2);
      row.classList.toggle("dead", !(index.density[latent] > 0));
      link.textContent = latent;
      link.href = dashboard.latentAddress(latent, dashboard.query());
      density(percent(index.density[latent], 2), bar(index.density[latent]));
      max(number(index.max[latent]), strength(index.max[latent]));
      cells.mean.textContent = number(index.mean[latent]);
      if (cells.score) cells.score.textContent = number(index.score[latent]);
      cells.label.textContent = labels?.of(latent) ?? "";
      cells.label.classList.toggle("hint", labels?.isHint(latent) ?? false);
    };
    return { row, link, set };
  }

  const rowHeight = () => parseFloat(getComputedStyle(element).getPropertyValue("--row"));
  /** How far the list is scrolled, and how far the scroll bar is, in pixels. */
  const sizes = () => {
    const height = rowHeight();
    const full = list.length * height;
    const tall = Math.min(full, TALLEST);
    const view = element.clientHeight;
    const scale = tall > view ? (full - view) / (tall - view) : 1;
    return { height, tall, view, scale };
  };

  function render() {
    const { height, tall, view, scale } = sizes();
    spacer.style.height = `${tall}px`;
    const needed = Math.ceil(view / height) + 2;
    if (pool.length !== needed) {
      pool = Array.from({ length: needed }, make);
      body.replaceChildren(...pool.map(({ row }) => row));
    }
    const top = element.scrollTop * scale;
    const first = Math.max(0, Math.min(Math.floor(top / height), list.length - needed));
    body.style.transform = `translateY(${element.scrollTop - top}px)`;
    for (let i = 0; i < needed; i++) {
      const position = first + i;
      const { row, set } = pool[position % needed];
      row.hidden = position >= list.length;
      if (row.hidden) continue;
      row.style.transform = `translateY(${position * height}px)`;
      set(position);
    }
  }

  /** Gives the row at a position the focus, scrolling as far as it takes. */
  function go(position) {
    if (!list.length) return;
    position = Math.max(0, Math.min(list.length - 1, position));
    const { height, view, scale } = sizes();
    const top = element.scrollTop * scale;
    const low = (position + 1) * height - view;
    const high = position * height;
    if (top < low || top > high) element.scrollTop = (top < low ? low : high) / scale;
    render();
    pool
      .find(({ row }) => row.position === position && !row.hidden)
      ?.link.focus({ preventScroll: true });
  }

  element.addEventListener("scroll", () => {
    scrolledTo = element.scrollTop;
    render();
  });
  element.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { height, view, scale } = sizes();
    const page = Math.floor(view / height) - 1;
    const own = document.activeElement.closest(".row")?.position;
    const at = own ?? Math.ceil((element.scrollTop * scale) / height) - 1;
    const to = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + page,
      PageUp: at - page,
      Home: 0,
      End: list.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  new ResizeObserver(() => element.clientHeight && render()).observe(element);

  return {
    element,
    /** Shows a list: from its top if it is another, else where it was left. */
    show(next, key) {
      list = next;
      const top = key === shownKey ? scrolledTo : 0;
      shownKey = key;
      spacer.style.height = `${sizes().tall}px`;
      element.scrollTop = top;
      render();
    },
    refresh(loaded) {
      labels = loaded;
      render();
    },
  };
}

function meter(cell) {
  const text = h("span", { class: "value" });
  const bar = h("span", { class: "meter" });
  cell.append(bar, text);
  return (value, share) => {
    text.textContent = value;
    bar.style.setProperty("--share", Math.max(0, Math.min(1, share)).toFixed(3));
  };
}

/** How long the bar of a value is: logarithmic between the smallest above zero and the largest. */
function logBar(values) {
  let low = Infinity;
  let high = 0;
  for (const value of values) {
    if (!(value > 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const reach = Math.max(1e-9, Math.log(high) - Math.log(low));
  return (value) => (value > 0 ? 0.04 + (0.96 * (Math.log(value) - Math.log(low))) / reach : 0);
}
