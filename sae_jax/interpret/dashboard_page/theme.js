// Light or dark: as the system has it, or as the button says, which this browser remembers.

const THEMES = {
  "": { sign: "◐", name: "as the system" },
  light: { sign: "○", name: "light" },
  dark: { sign: "●", name: "dark" },
};
const KEY = "sae_jax_theme";

// A browser may keep nothing, and then says so by an error.
function stored() {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function store(theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    return;
  }
}

/** Makes a button go through the themes. */
export function themeButton(button) {
  const names = Object.keys(THEMES);
  const set = (theme) => {
    const { sign, name } = THEMES[theme];
    document.documentElement.dataset.theme = theme;
    button.textContent = sign;
    button.title = `Colours: ${name}`;
    button.setAttribute("aria-label", `Colours: ${name}`);
  };
  set(Object.hasOwn(THEMES, stored()) ? stored() : "");
  button.addEventListener("click", () => {
    const at = names.indexOf(document.documentElement.dataset.theme);
    const next = names[(at + 1) % names.length];
    store(next);
    set(next);
  });
}
