// The dashboard: what the address asks for is shown. `#/` is the list of all latents, `#/latent/7`
// one of them, `#/latent/7/example/0/2` one of its examples, `#/live` the model itself, `#/about`
// what was measured. The query of the address says which list it is.

import { aboutView } from "./about.js";
import * as data from "./data.js";
import { failure } from "./dom.js";
import { latentView } from "./latent.js";
import { listView } from "./list.js";
import { liveView } from "./live.js";
import { beside, listQuery, lists } from "./order.js";
import { themeButton } from "./theme.js";
import { hideTip } from "./tips.js";

const content = document.getElementById("content");
const keys = document.getElementById("keys");

/** The parts and the query of an address's hash: `#/latent/7?sort=max` is ["latent", "7"] and it. */
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...parts] = path.split("/");
  return { view, parts, query: new URLSearchParams(query) };
}

function withQuery(address, query) {
  const text = listQuery(query);
  return text ? `${address}?${text}` : address;
}

async function start() {
  let dashboard;
  try {
    const about = await data.about();
    const index = await data.columns(about.d_sae);
    dashboard = share(about, index);
  } catch (error) {
    content.replaceChildren(failure(error, start));
    return;
  }
  open(dashboard);
}

/** What all views know. */
function share(about, index) {
  const labels = data.labels(about.d_sae, about.explained);
  const search = about.can.search
    ? async (text) => new Set((await data.ask("search", { query: text, limit: 10_000 })).latents)
    : data.latentsOfWords;
  let live = new URLSearchParams();
  return {
    about,
    index,
    labels,
    list: lists(index, labels, search),
    query: () => route().query,
    listAddress: (query) => withQuery("#/", query),
    latentAddress: (latent, query) => withQuery(`#/latent/${latent}`, query),
    /** Keeps the live panel's settings, for when one comes back to it from elsewhere. */
    keepLive(query) {
      live = new URLSearchParams(query);
      document.getElementById("to-live").href = `#/live?${live}`;
    },
    /** Puts settings of the live panel into the address, in place of those of the same names. */
    keepInAddress(names, pairs) {
      const { query } = route();
      names.forEach((name) => query.delete(name));
      pairs.forEach(([name, value]) => query.append(name, value));
      history.replaceState(null, "", `#/live?${query}`);
      this.keepLive(query);
    },
    steerAddress(latent) {
      const query = new URLSearchParams(live);
      query.append("clamp", `${latent}:5`);
      return `#/live?${query}`;
    },
  };
}

function open(dashboard) {
  const { about } = dashboard;
  document.getElementById("title").textContent = about.title;
  const live = about.can.encode || about.can.generate;
  document.getElementById("to-live").hidden = !live;
  const makers = {
    "": listView,
    latent: latentView,
    about: aboutView,
    ...(live ? { live: liveView } : {}),
  };
  const views = new Map();
  let current = null;

  async function show() {
    const asked = route();
    const name = Object.hasOwn(makers, asked.view) ? asked.view : "";
    if (!views.has(name)) views.set(name, makers[name](dashboard));
    const view = views.get(name);
    hideTip();
    document.body.dataset.view = name || "list";
    for (const [id, own] of [
      ["to-list", ""],
      ["to-live", "live"],
      ["to-about", "about"],
    ]) {
      document.getElementById(id).toggleAttribute("aria-current", own === name);
    }
    document.getElementById("to-list").href = dashboard.listAddress(asked.query);
    if (current !== view) content.replaceChildren(view.element);
    current = view;
    const title = await view.show(asked);
    if (title !== null) document.title = [title, about.title].filter(Boolean).join(" · ");
  }

  dashboard.replace = (address) => {
    history.replaceState(null, "", address);
    show();
  };
  const random = async () => {
    const list = await dashboard.list(route().query);
    if (!list.length) return;
    const latent = list[Math.floor(Math.random() * list.length)];
    location.hash = dashboard.latentAddress(latent, route().query);
  };
  document.getElementById("random").addEventListener("click", random);
  const click = (id) => document.getElementById(id)?.click();
  const search = () => {
    if (current !== views.get("")) {
      history.pushState(null, "", dashboard.listAddress(route().query));
      show();
    }
    views.get("").focusSearch();
  };
  // From what the address says, not from what is drawn: keys may come faster.
  const step = async (side) => {
    const list = await dashboard.list(route().query);
    const { view, parts, query } = route();
    const to = view === "latent" ? beside(list, Number(parts[0]), about.d_sae)[side] : null;
    if (to !== null) location.hash = dashboard.latentAddress(to, query);
  };
  const actions = {
    "/": search,
    "?": () => keys.showModal(),
    r: random,
    c: () => click("copy"),
    u: () => (location.hash = dashboard.listAddress(route().query)),
    ArrowLeft: () => step(0),
    ArrowRight: () => step(1),
  };
  document.addEventListener("keydown", (event) => {
    const { target, key, altKey, ctrlKey, metaKey, defaultPrevented } = event;
    if (altKey || ctrlKey || metaKey || defaultPrevented || keys.open) return;
    if (target.matches("input, select, textarea")) return;
    if (!Object.hasOwn(actions, key)) return;
    event.preventDefault();
    actions[key]();
  });
  window.addEventListener("hashchange", show);
  show();
}

themeButton(document.getElementById("theme"));
document.getElementById("help").addEventListener("click", () => keys.showModal());
start();
