// Elements and numbers. Text only ever becomes text nodes and attributes, never markup: the tokens
// of a model may be anything.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "share") element.style.setProperty("--share", value.toFixed(4));
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/**
 * Makes an element. A property is an attribute, or a listener (`onclick`), or `share`: a part of
 * 0..1 that style.css reads as --share. Strings among the children are text.
 */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same of SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** A button of the page: never one that sends a form. */
export function button(text, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, text);
}

/** A number to three digits: 0.0123, 12.3, 12,345; an en dash if there is none. */
export function number(value, digits = 3) {
  if (value === null || Number.isNaN(value)) return "–";
  if (value < 0) return `−${number(-value, digits)}`;
  if (value !== 0 && value < 1e-4) return value.toExponential(digits - 1);
  if (value >= 10 ** digits) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** A number with its sign, the minus a minus: +0.12, −3.4. */
export function signed(value, digits = 3) {
  return (value < 0 ? "" : "+") + number(value, digits);
}

/** A share of tokens: 1.2 %, 0.00031 %. */
export function percent(value, digits = 3) {
  return `${number(100 * value, digits)} %`;
}

/** An integer: 12,345. */
export function count(value) {
  return value.toLocaleString("en");
}

/** Says something to those who hear the page. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A message in place of what could not be shown, with a button that tries again. */
export function failure(error, again) {
  return h(
    "div",
    { class: "message failed", role: "alert" },
    h("p", {}, error.message),
    again ? button("Try again", again) : null,
  );
}
