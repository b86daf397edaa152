// Histograms and bars.

import { count, h, number, signed, svg } from "./dom.js";
import { explain, steppable } from "./tips.js";

const HEIGHT = 100;

/**
 * A histogram of counts in equal parts of low..high, the heights logarithmic, since activations
 * and logits both have tails that matter.
 *
 * caption: what it shows; what: what is counted, for the tip of a bar; zero: whether to draw 0.
 */
export function histogram(counts, low, high, { caption, what, zero = false }) {
  const top = Math.log1p(Math.max(1, ...counts));
  const edge = (part) => low + ((high - low) * part) / counts.length;
  const bars = counts.map((n, part) => {
    const height = (HEIGHT * Math.log1p(n)) / top;
    const bar = svg(
      "g",
      { class: "bin" },
      svg("rect", { class: "reach", x: part, y: 0, width: 1, height: HEIGHT }),
      svg("rect", { x: part + 0.08, y: HEIGHT - height, width: 0.84, height }),
    );
    const reach = `${number(edge(part))} to ${number(edge(part + 1))}`;
    explain(bar, () => [h("b", {}, count(n)), ` ${what} from ${reach}`]);
    return bar;
  });
  const at = (counts.length * (0 - low)) / (high - low);
  const line = zero && at > 0 && at < counts.length;
  const chart = svg(
    "svg",
    {
      viewBox: `0 0 ${counts.length} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "group",
      "aria-label": `${caption}. ${count(counts.reduce((a, b) => a + b, 0))} ${what}.`,
    },
    line ? svg("line", { class: "zero", x1: at, x2: at, y1: 0, y2: HEIGHT }) : null,
    ...bars,
  );
  steppable(chart, bars);
  return h(
    "figure",
    { class: "histogram" },
    h("figcaption", {}, caption),
    chart,
    h("div", { class: "axis" }, h("span", {}, number(low)), h("span", {}, number(high))),
  );
}

/** Tokens with values as bars from a common middle, the positive ones to the right. */
export function diverging(rows) {
  const largest = Math.max(1e-30, ...rows.map(([, value]) => Math.abs(value)));
  return h(
    "ul",
    { class: "diverging" },
    rows.map(([text, value]) =>
      h(
        "li",
        {},
        h("span", { class: "chip", dir: "auto" }, text),
        h(
          "span",
          { class: "track" },
          h("span", {
            class: value < 0 ? "bar less" : "bar more",
            share: Math.abs(value) / largest,
          }),
        ),
        h("span", { class: "value" }, signed(value)),
      ),
    ),
  );
}
