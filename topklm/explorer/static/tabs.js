// Sections of a [data-tabs] become tabs; without scripts they stand one below the other.

let made = 0;

export function makeTabs(root) {
  for (const box of root.querySelectorAll("[data-tabs]")) {
    const panels = [...box.children];
    if (panels.length < 2 || box.dataset.made) continue;
    box.dataset.made = "yes";
    const list = document.createElement("div");
    list.className = "tab-list";
    list.setAttribute("role", "tablist");
    const buttons = panels.map((panel) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = panel.dataset.title;
      panel.id ||= `panel-${++made}`;
      button.id = `${panel.id}-tab`;
      button.setAttribute("role", "tab");
      button.setAttribute("aria-controls", panel.id);
      const title = panel.querySelector("h3");
      if (title?.title) button.title = title.title;
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", button.id);
      panel.removeAttribute("aria-label");
      return button;
    });
    const choose = (chosen) =>
      panels.forEach((panel, place) => {
        panel.hidden = place !== chosen;
        buttons[place].setAttribute("aria-selected", String(place === chosen));
        buttons[place].tabIndex = place === chosen ? 0 : -1;
      });
    buttons.forEach((button, place) => button.addEventListener("click", () => choose(place)));
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
      choose(next);
      buttons[next].focus();
    });
    list.append(...buttons);
    box.prepend(list);
    choose(0);
  }
}
