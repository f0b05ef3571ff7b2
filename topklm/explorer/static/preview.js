// A card with a neuron's label, tokens and an example, where a link to it is pointed at or has the focus.

const LINKS = "a.neuron-name, a.cell, a.of-step, [data-address]";
const WAIT = 250; // milliseconds, so that nothing flickers under a pointer that passes
const cards = new Map();
let card = null;
let timer = 0;
let wanted = null;

function addressOf(link) {
  const { pathname, searchParams } = new URL(link.dataset.address ?? link.href, location);
  return [pathname, searchParams.has("step") ? `?step=${searchParams.get("step")}` : ""];
}

async function show(link) {
  const [path, step] = addressOf(link);
  const address = path + step;
  if (!/^\/neurons\/\d+\/\d+$/.test(path) || address === location.pathname) return;
  if (!cards.has(address)) {
    try {
      const answer = await fetch(`${path}/preview${step}`);
      if (!answer.ok) return;
      cards.set(address, await answer.text());
    } catch {
      return;
    }
  }
  if (wanted !== link || !link.isConnected) return;
  hide();
  wanted = link;
  const page = new DOMParser().parseFromString(cards.get(address), "text/html");
  card = document.adoptNode(page.querySelector(".preview"));
  card.id = "preview";
  document.body.append(card);
  link.querySelector("title")?.remove(); // the browser would show it too
  link.removeAttribute("title");
  link.setAttribute("aria-describedby", "preview");
  place(link.getBoundingClientRect());
}

function place(at) {
  const { width, height } = card.getBoundingClientRect();
  const under = at.bottom + 6 + height < innerHeight || at.top < height + 6;
  card.style.left = `${scrollX + Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
  card.style.top = `${scrollY + (under ? at.bottom + 6 : at.top - height - 6)}px`;
}

function hide() {
  clearTimeout(timer);
  wanted?.removeAttribute("aria-describedby");
  card?.remove();
  card = wanted = null;
}

function soon(link) {
  if (link === wanted) return clearTimeout(timer);
  clearTimeout(timer);
  timer = setTimeout(() => {
    hide();
    wanted = link;
    show(link);
  }, WAIT);
}

const leave = () => {
  clearTimeout(timer);
  timer = setTimeout(hide, WAIT);
};

document.addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch" || event.buttons) return;
  const link = event.target.closest?.(LINKS);
  if (link) soon(link);
  else if (event.target.closest?.("#preview")) clearTimeout(timer);
  else if (card || wanted) leave();
  else clearTimeout(timer);
});
document.addEventListener("focusin", (event) => {
  const link = event.target.closest(LINKS);
  if (link?.matches(":focus-visible")) soon(link);
  else if (card) leave();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
document.addEventListener("pointerdown", hide);
