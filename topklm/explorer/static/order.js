// On a neuron's page "next" and "previous" follow the table that one came from; else the numbers of neurons.

const KEY = "topklm-order";
const links = (root) => [...root.querySelectorAll("th a.neuron-name")].map((link) => new URL(link.href, location).pathname);

const keep = (order) => {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(order));
  } catch {
    // Storage may be off.
  }
};
const kept = () => {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
};

const more = (table) => table?.closest("section")?.querySelector(".pager a[rel=next]")?.href;

document.addEventListener("click", (event) => {
  const table = event.target.closest("a.neuron-name")?.closest("table.neurons");
  if (table) keep({ places: links(table), table: location.href, more: more(table) });
});

export async function followTable() {
  const steps = document.querySelector(".steps");
  const order = kept();
  const at = order?.places.indexOf(location.pathname) ?? -1;
  if (!steps || at < 0) return;
  const note = document.createElement("a");
  note.href = order.table;
  note.className = "quiet";
  note.textContent = `${at + 1} of ${order.places.length}${order.more ? "+" : ""} in the table`;
  const [prev, next] = ["prev", "next"].map((rel) => steps.querySelector(`a[rel=${rel}]`));
  lead(prev, order.places[at - 1], order.table, (name) => `← ${name}`);
  lead(next, order.places[at + 1], order.table, (name) => `${name} →`);
  prev.after(note);
  if (at + 1 < order.places.length || !order.more) return;
  try {
    const answer = await fetch(order.more);
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const table = page.querySelector("table.neurons");
    order.places.push(...links(table));
    const following = page.querySelector(".pager a[rel=next]")?.getAttribute("href");
    order.more = following && new URL(following, location).href;
    keep(order);
    lead(next, order.places[at + 1], order.table, (name) => `${name} →`);
  } catch {
    // The link leads back to the table.
  }
}

function lead(link, place, table, write) {
  link.href = place ?? table;
  link.textContent = write(place ? place.split("/").slice(-2).join(":") : "table");
}
