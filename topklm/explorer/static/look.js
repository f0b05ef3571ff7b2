// How pages look: the theme, and what is shown of examples. Both are remembered by the browser.

const root = document.documentElement;

const remember = (name, value) => {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Storage may be off; then it lasts as long as the page.
  }
};

const recall = (name) => {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
};

export function toggleTheme() {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  remember("topklm-theme", root.dataset.theme);
  // So that the server can say it in the page, before anything is drawn.
  document.cookie = `topklm_theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=lax`;
  return true;
}

export const toggle = (name) => () => {
  const on = !root.classList.contains(`show-${name}`);
  remember(`topklm-${name}`, on ? "yes" : "no");
  show(name, on);
  return true;
};

function show(name, on) {
  root.classList.toggle(`show-${name}`, on);
  for (const button of document.querySelectorAll(`[data-toggle=${name}]`)) {
    button.setAttribute("aria-pressed", String(on));
  }
}

export function restore() {
  for (const name of ["values", "whole"]) show(name, recall(`topklm-${name}`) === "yes");
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-toggle]");
  if (button) toggle(button.dataset.toggle)();
  else if (event.target.closest("[data-theme-toggle]")) toggleTheme();
});
