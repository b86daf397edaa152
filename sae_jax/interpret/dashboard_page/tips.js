// The small box that says more about a token or a bar: under the pointer, on a tap, and by
// keyboard, where a text or a chart is one stop of Tab and the arrows go along its parts.

const box = document.getElementById("tip");
const contents = new WeakMap();
let shown = null;

/** Gives an element a tip; `content` makes its nodes when it is to be seen. */
export function explain(element, content) {
  contents.set(element, content);
}

/** Makes a row of elements one stop of Tab; the arrows go along it. */
export function steppable(container, items) {
  container.tabIndex = 0;
  for (const item of items) item.setAttribute("tabindex", "-1");
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    const at = items.indexOf(document.activeElement);
    const next = at < 0 && step < 0 ? items.length - 1 : at + step;
    items[Math.max(0, Math.min(items.length - 1, next))]?.focus();
    event.preventDefault();
    event.stopPropagation();
  });
}

/** Takes the tip away. */
export function hideTip() {
  shown?.removeAttribute("aria-describedby");
  shown = null;
  box.hidden = true;
}

function explained(target) {
  while (target instanceof Element && !contents.has(target)) target = target.parentElement;
  return target instanceof Element ? target : null;
}

function show(element) {
  if (element === shown) return;
  hideTip();
  if (!element) return;
  shown = element;
  box.replaceChildren(...[contents.get(element)()].flat());
  box.hidden = false;
  element.setAttribute("aria-describedby", box.id);
  place();
}

function place() {
  const [rect] = shown.getClientRects();
  if (!rect) return hideTip();
  const { width, height } = box.getBoundingClientRect();
  const left = rect.left + rect.width / 2 - width / 2;
  const above = rect.top - height - 8;
  const right = document.documentElement.clientWidth - width - 8;
  box.style.left = `${Math.max(8, Math.min(left, right))}px`;
  box.style.top = `${above > 8 ? above : rect.bottom + 8}px`;
}

document.addEventListener("pointerover", (event) => {
  if (event.pointerType === "mouse") show(explained(event.target));
});
document.addEventListener("click", (event) => show(explained(event.target)));
document.addEventListener("focusin", (event) => {
  if (event.target.matches(":focus-visible")) show(explained(event.target));
});
document.addEventListener(
  "scroll",
  // Going to a token may scroll it into view: the tip stays with it.
  () => (shown && shown === document.activeElement ? place() : hideTip()),
  { capture: true, passive: true },
);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !shown) return;
  hideTip();
  if (document.activeElement?.tabIndex === -1) document.activeElement.blur();
});
