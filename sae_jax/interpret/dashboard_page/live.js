// The model itself, in two panels: which latents fire on texts that are typed, and what it says with
// some of them held at other strengths. All settings are in the address: a link shows the same.

import { h } from "./dom.js";
import { readingPanel } from "./reading.js";
import { steeringPanel } from "./steering.js";

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
