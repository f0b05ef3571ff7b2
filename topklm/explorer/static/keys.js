// What keys do. None of them acts while somebody types, or together with Ctrl, Alt or Meta.

const typing = (element) => element?.closest("input, textarea, select, [contenteditable], dialog[open], [role=tablist], .scroll");

export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
    if (typing(event.target)) return;
    if (actions[event.key]?.()) event.preventDefault();
  });
}

export const follow = (selector) => () => {
  const link = document.querySelector(selector);
  link?.click();
  return link !== null;
};

export const focus = (selector) => () => {
  const field = document.querySelector(selector);
  field?.focus();
  field?.select?.();
  return field !== null;
};
