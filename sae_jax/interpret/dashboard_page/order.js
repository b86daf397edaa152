// Which latents the list has and in which order. All of it follows from the query of the address,
// so that a link to a list is a link to the same list.

/** The columns that a list can be sorted by, with the order that a first click gives. */
export const COLUMNS = {
  latent: "latent",
  density: "-density",
  max: "-max",
  mean: "-mean",
  score: "-score",
  label: "label",
};
export const RANGES = ["density", "max", "score"];
const KEYS = ["sort", "seed", "q", "in", "dead", ...RANGES];

/** The settings of a list from the query of an address. A density is in percent, as it is shown. */
export function settings(query) {
  const ranges = RANGES.map((name) => [name, range(query.get(name) ?? "")]);
  const sort = query.get("sort") ?? "latent";
  return {
    sort: sort === "random" || Object.hasOwn(COLUMNS, sort.replace(/^-/, "")) ? sort : "latent",
    seed: Number(query.get("seed") ?? 0) >>> 0,
    text: (query.get("q") ?? "").trim(),
    everywhere: query.get("in") === "examples",
    dead: query.get("dead") === "1",
    ranges: Object.fromEntries(ranges),
  };
}

/** The part of an address's query that says which list it is, as text, in one order. */
export function listQuery(query) {
  const own = KEYS.filter((key) => query.get(key)).map((key) => [key, query.get(key)]);
  return String(new URLSearchParams(own));
}

function range(text) {
  const [low, high] = text.split("..").map((part) => (part.trim() === "" ? NaN : Number(part)));
  return { low: Number.isNaN(low) ? -Infinity : low, high: high >= -Infinity ? high : Infinity };
}

/** Mixes the bits of an integer (the finaliser of MurmurHash3): equal seeds, equal orders. */
function mixed(value) {
  value = Math.imul(value ^ (value >>> 16), 0x85ebca6b);
  value = Math.imul(value ^ (value >>> 13), 0xc2b2ae35);
  return (value ^ (value >>> 16)) >>> 0;
}

/**
 * Returns a function from an address's query to a promise of the list's latents in its order, a
 * Uint32Array. The last list is remembered, since going from latent to latent asks for it again.
 *
 * index: the columns; labels: a promise of the labels, waited for only where the list needs them;
 * search: from a text to a promise of the set of latents with it in their examples.
 */
export function lists(index, labels, search) {
  let last = { key: null, list: null };
  const make = async (query) => {
    const wanted = settings(query);
    const labelled = wanted.text || wanted.sort.replace(/^-/, "") === "label";
    const found = wanted.text && wanted.everywhere ? await search(wanted.text) : null;
    return select(index, labelled ? await labels : null, found, wanted);
  };
  return (query) => {
    const key = listQuery(query);
    if (key !== last.key) {
      last = { key, list: make(query) };
      last.list.catch(() => (last = { key: null, list: null })); // so that it is tried again
    }
    return last.list;
  };
}

/**
 * The latents before and after one in a list, null where there is none. One that the list lacks has
 * those of the next numbers, of `latents` in all.
 */
export function beside(list, latent, latents) {
  const place = list.indexOf(latent);
  if (place >= 0) return [list[place - 1] ?? null, list[place + 1] ?? null];
  return [latent > 0 ? latent - 1 : null, latent < latents - 1 ? latent + 1 : null];
}

function select(index, labels, found, { sort, seed, text, dead, ranges }) {
  const latents = index.density.length;
  const bounds = RANGES.map((name) => {
    const scale = name === "density" ? 100 : 1;
    // In the precision of the columns, so that "from 0.9" has those that are shown as 0.9.
    const [low, high] = [ranges[name].low, ranges[name].high].map((end) =>
      Math.fround(end / scale),
    );
    return { values: index[name], low, high };
  }).filter(({ low, high }) => low > -Infinity || high < Infinity);
  const wanted = text.toLowerCase();
  const chosen = new Uint32Array(latents);
  let size = 0;
  for (let i = 0; i < latents; i++) {
    if (!dead && !(index.density[i] > 0)) continue;
    // A value that is missing (NaN) lies in no range.
    if (!bounds.every((b) => b.values[i] >= b.low && b.values[i] <= b.high)) continue;
    if (wanted && !labels.has(i, wanted) && !found?.has(i)) continue;
    chosen[size++] = i;
  }
  return sorted(chosen.slice(0, size), index, labels, sort, seed);
}

function sorted(chosen, index, labels, sort, seed) {
  const name = sort.replace(/^-/, "");
  const sign = sort.startsWith("-") ? -1 : 1;
  if (name === "latent") return sign < 0 ? chosen.reverse() : chosen;
  if (name === "random") {
    const keys = Float64Array.from(chosen, (i) => mixed(i ^ mixed(seed + 1)));
    const places = Uint32Array.from(chosen, (_, at) => at).sort((a, b) => keys[a] - keys[b]);
    return places.map((at) => chosen[at]);
  }
  // Those without a value come last in either direction.
  const has =
    name === "label" ? (i) => labels.lower(i) !== "" : (i) => !Number.isNaN(index[name][i]);
  const compare = name === "label" ? byLabel(labels) : (a, b) => index[name][a] - index[name][b];
  const present = chosen.filter(has).sort((a, b) => sign * compare(a, b));
  const result = new Uint32Array(chosen.length);
  result.set(present);
  result.set(
    chosen.filter((i) => !has(i)),
    present.length,
  );
  return result;
}

function byLabel(labels) {
  const { compare } = new Intl.Collator("en", { numeric: true });
  return (a, b) => compare(labels.lower(a), labels.lower(b));
}
