// What pages do besides being read.

import "./brush.js";
import "./fragments.js";
import { focus, follow, listen } from "./keys.js";
import { followTable } from "./order.js";
import "./preview.js";
import "./progress.js";
import { restore, toggle, toggleTheme } from "./look.js";
import { startSteering } from "./steer.js";
import "./steps.js";
import { makeTabs } from "./tabs.js";

const help = document.querySelector("#help");
const openHelp = () => {
  help.showModal();
  return true;
};
const leave = (address) => () => {
  location.assign(address);
  return true;
};

listen({
  j: follow("a[rel=next]"),
  k: follow("a[rel=prev]"),
  ArrowRight: follow(".steps a[rel=next]"),
  ArrowLeft: follow(".steps a[rel=prev]"),
  "[": follow("[data-earlier]"),
  "]": follow("[data-later]"),
  r: leave("/random"),
  l: focus("#label-field"),
  u: follow("[data-next-unlabelled]"),
  v: toggle("values"),
  w: toggle("whole"),
  g: focus(".go input"),
  t: toggleTheme,
  "/": () => focus("#search input[type=search]")() || leave("/search")(),
  "?": openHelp,
});

document.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  const more = event.target.closest("[data-more]");
  const point = event.target.closest("[data-address]");
  if (event.target.closest("[data-help]")) openHelp();
  else if (point) location.assign(point.dataset.address);
  else if (more) await showMore(more);
  else if (copy && navigator.clipboard) {
    event.preventDefault();
    const text = await (await fetch(copy.href)).text();
    const before = copy.textContent;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = before), 1500);
    } catch {
      location.assign(copy.href);
    }
  }
});

// A file goes into the field that its form sends.
document.addEventListener("change", async (event) => {
  const [file] = event.target.files ?? [];
  if (file && event.target.dataset.into) document.querySelector(event.target.dataset.into).value = await file.text();
});

// First all of the window that the page holds, then more of the document.
async function showMore(button) {
  const example = button.closest(".example");
  if (!example.classList.contains("whole") && !document.documentElement.classList.contains("show-whole")) {
    example.classList.add("whole");
    return;
  }
  const size = Number(button.dataset.size ?? 128) * 2;
  const address = `/api${location.pathname}/context?at=${example.dataset.at}&size=${size}`;
  const answer = await fetch(address);
  if (!answer.ok) return;
  const { pieces, tokens } = await answer.json();
  const text = example.querySelector(".text");
  text.replaceChildren(...pieces.map(piece));
  button.dataset.size = size;
  if (size >= 1024 || tokens.length < size) button.remove();
}

function piece({ text, level, value, example }) {
  if (!level) return document.createTextNode(text);
  const mark = document.createElement("mark");
  mark.className = example ? `${level} here` : level;
  mark.dataset.v = value;
  mark.textContent = text;
  return mark;
}

makeTabs(document);
startSteering(document.querySelector("#steer"));
followTable();
restore();
