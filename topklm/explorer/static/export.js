// What a file of pages does without a server: shows the neuron that the address asks for, sorts the table.

const overview = document.querySelector("#overview");
const place = document.querySelector("#neuron");
const body = document.querySelector("#neurons tbody");
const order = () => [...body.querySelectorAll("a.neuron-name")].map((link) => link.getAttribute("href"));

let latest = 0;

async function showAddress() {
  const mine = ++latest;
  const found = /^#\/(neurons\/(\d+)\/(\d+)|formation|layers)(?:\/(\d+))?$/.exec(location.hash);
  const page = found && document.getElementById(found[2] ? `n-${found[2]}-${found[3]}` : `p-${found[1]}`);
  const content = page ? await unpacked(page.textContent) : null;
  if (mine !== latest) return;
  overview.hidden = Boolean(page);
  place.hidden = !page;
  place.replaceChildren(...(content ? content.body.childNodes : []));
  const all = order();
  const at = page ? all.indexOf(`#/${found[1]}`) : -1;
  const neighbours = { prev: at < 0 ? all.length - 1 : at - 1, next: at + 1 };
  for (const [step, to] of Object.entries(neighbours)) {
    document.querySelector(`[data-step=${step}]`).href = all[(to + all.length) % all.length] ?? "#/";
  }
  document.title = page ? page.dataset.title : document.querySelector("#overview h1").textContent;
  if (!page) return;
  showStep(found[4]);
  makeTabs(place);
  restore();
  scrollTo(0, 0);
  place.querySelector("h1").focus({ preventScroll: true });
}

const stepLinks = () => [...place.querySelectorAll(".of-step")];
const isShown = (link) => link.getAttribute("href") === location.hash;

// A step of the trace takes the place of all but the strip of steps.
function showStep(step) {
  const section = step && place.querySelector(`[data-trace-step="${step}"]`);
  if (!section) return;
  const now = place.querySelector("[data-now]");
  for (const part of now.children) part.hidden = !part.matches(".life");
  now.prepend(section.querySelector(".at-step"));
  now.append(section);
  section.hidden = false;
  stepLinks().find(isShown)?.setAttribute("aria-current", "step");
}

// From the page without a step, which is that of the last, or to one beside that which is shown.
const stepBy = (by) => () => {
  const links = stepLinks();
  const at = links.findIndex(isShown);
  const next = links[(at < 0 ? links.length - 1 : at) + by];
  if (next) location.hash = next.getAttribute("href");
  return Boolean(next);
};

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new DOMParser().parseFromString(await new Response(stream).text(), "text/html");
}

function sortBy(head) {
  const falling = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) {
    other.removeAttribute("aria-sort");
    const arrow = other.querySelector(".arrow");
    if (arrow) arrow.textContent = "";
  }
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  head.querySelector(".arrow").textContent = falling ? "↓" : "↑";
  const column = head.cellIndex;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === "" || right === "") return (left === "") - (right === "");
    return falling ? right - left : left - right;
  });
  body.append(...rows);
  showAddress();
}

document.addEventListener("click", (event) => {
  const head = event.target.closest("th:has(button.sort)");
  if (head) sortBy(head);
});
addEventListener("hashchange", showAddress);
listen({
  j: follow("[data-step=next]"),
  k: follow("[data-step=prev]"),
  ArrowRight: follow("[data-step=next]"),
  ArrowLeft: follow("[data-step=prev]"),
  "[": stepBy(-1),
  "]": stepBy(1),
  v: toggle("values"),
  w: toggle("whole"),
  t: toggleTheme,
});
try {
  const theme = localStorage.getItem("topklm-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be off; then the system's theme stays.
}
showAddress();
