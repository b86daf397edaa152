// What the page reads: the files of data/, and the API of a server that has one. Addresses are
// relative to this file, so that the folder works under any path.

const SHARDS_KEPT = 16;
const WORD_SHARDS = 64;

/** What was asked for and did not come; its message says what, why and what to do. */
export class Unreachable extends Error {}

async function response(path, options) {
  try {
    return await fetch(new URL(path, import.meta.url), options);
  } catch {
    throw new Unreachable(
      `Could not reach ${path}: the server does not answer. Is it still running, and this ` +
        "computer connected?",
    );
  }
}

const damaged = new Set(); // these are not taken from the browser's cache again

/** A file, asked for again each time in case it is another by now; mostly it is not sent again. */
async function bytes(path) {
  const answer = await response(path, { cache: damaged.has(path) ? "reload" : "no-cache" });
  if (!answer.ok) {
    const own = answer.headers.get("Content-Type")?.startsWith("application/json");
    const { error } = own ? await answer.json() : {};
    const hint = answer.status === 404 ? " Was the folder copied whole?" : "";
    throw new Unreachable(
      error ?? `Could not read ${path}: the server says ${answer.status}.${hint}`,
    );
  }
  return answer.arrayBuffer();
}

async function json(path) {
  let data = await bytes(path);
  const [first, second] = new Uint8Array(data, 0, Math.min(2, data.byteLength));
  // Some hosts name the encoding of *.gz, and then the browser has unpacked it.
  if (first === 0x1f && second === 0x8b) {
    const unpacked = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
    try {
      data = await new Response(unpacked).arrayBuffer();
    } catch {
      damaged.add(path);
      throw new Unreachable(`${path} is damaged: it cannot be unpacked. Copy it again.`);
    }
  }
  try {
    return JSON.parse(new TextDecoder().decode(data));
  } catch {
    damaged.add(path);
    throw new Unreachable(`${path} is damaged: it is no JSON. Copy it again.`);
  }
}

const remembered = new Map();

/** A file of JSON; the last few are kept, so that going back and forth reads nothing again. */
function kept(path) {
  const found = remembered.get(path) ?? json(path);
  remembered.delete(path);
  remembered.set(path, found);
  found.catch(() => remembered.delete(path));
  if (remembered.size > SHARDS_KEPT) remembered.delete(remembered.keys().next().value);
  return found;
}

/** What the dashboard is about: data/about.json. */
export function about() {
  return json("data/about.json");
}

/** The columns of the index, each a Float32Array by latent. */
export async function columns(latents) {
  const path = "data/index.bin";
  const data = await bytes(path);
  if (data.byteLength !== 4 * 4 * latents) {
    throw new Unreachable(
      `${path} has ${data.byteLength} bytes, not the ${16 * latents} of ${latents} latents: it ` +
        "is damaged or of another dictionary. Copy the folder again.",
    );
  }
  const column = (at) => new Float32Array(data, 4 * latents * at, latents);
  return { density: column(0), mean: column(1), max: column(2), score: column(3) };
}

/**
 * What latents are called, and of those without a label the tokens on which they peak: as written,
 * and in lower case for sorting; "" where there is neither. Searched are all explanations besides.
 */
export class Labels {
  constructor(latents, texts = {}, hints = {}, explanations = {}) {
    this.texts = texts;
    this.written = new Array(latents).fill("");
    for (const [latent, text] of Object.entries(hints)) this.written[latent] = text;
    for (const [latent, text] of Object.entries(texts)) this.written[latent] = text;
    this.lowered = this.written.map((text) => text.toLowerCase());
    this.searched = this.lowered.slice();
    for (const [latent, said] of Object.entries(explanations)) {
      this.searched[latent] += `\n${said.join("\n").toLowerCase()}`;
    }
  }

  of(latent) {
    return this.written[latent];
  }

  /** Whether what it is called is only a hint. */
  isHint(latent) {
    return !Object.hasOwn(this.texts, latent);
  }

  lower(latent) {
    return this.lowered[latent];
  }

  /** Whether a text, in lower case, is in what it is called or in an explanation of it. */
  has(latent, text) {
    return this.searched[latent].includes(text);
  }
}

/** The labels of all latents, hints, and explanations where the latents were explained. */
export async function labels(latents, explained) {
  const names = ["labels", "hints", ...(explained ? ["explanations"] : [])];
  const files = names.map((name) => json(`data/${name}.json.gz`));
  return new Labels(latents, ...(await Promise.all(files)));
}

/** One latent, with all that its page shows. */
export async function latent(number, shard) {
  const name = String(Math.floor(number / shard)).padStart(5, "0");
  const path = `data/latents/${name}.json.gz`;
  const found = (await kept(path)).find((one) => one.index === number);
  if (!found) throw new Unreachable(`${path} lacks latent ${number}. Copy the folder again.`);
  return found;
}

/** FNV-1a of 32 bits. */
function hash(data) {
  return data.reduce((sum, byte) => Math.imul(sum ^ byte, 0x01000193) >>> 0, 0x811c9dc5);
}

/** The latents whose best examples have every word of the query at their peak or just before. */
export async function latentsOfWords(query) {
  const words = query.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [];
  const lists = words.map(async (word) => {
    const shard = hash(new TextEncoder().encode(word)) % WORD_SHARDS;
    const file = await kept(`data/words/${shard.toString(16).padStart(2, "0")}.json.gz`);
    return Object.hasOwn(file, word) ? file[word] : [];
  });
  const [first = [], ...others] = (await Promise.all(lists)).map((list) => new Set(list));
  return new Set([...first].filter((latent) => others.every((list) => list.has(latent))));
}

/** Posts to the API: encode, generate, ablate or search. The server's own words are the error's. */
export async function ask(what, body) {
  const answer = await response(`api/${what}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const text = await answer.text();
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    throw new Unreachable(`The server's answer to ${what} is no JSON (${answer.status}).`);
  }
  if (!answer.ok) {
    throw new Unreachable(values.error ?? `The server says ${answer.status} to ${what}.`);
  }
  return values;
}
