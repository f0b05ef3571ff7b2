// Links and forms with data-fragment="#part" replace that part of the page instead of loading all of it.
// The server answers with a whole page either way, so everything works without this, only less smoothly.

import { makeTabs } from "./tabs.js";
import { restore } from "./look.js";

let latest = 0;

async function replace(selector, address, options, push) {
  const mine = ++latest;
  const part = document.querySelector(selector);
  part.setAttribute("aria-busy", "true");
  const patience = part.dataset.waiting && setTimeout(() => say(part, part.dataset.waiting, "status"), 700);
  let answer, text;
  try {
    answer = await fetch(address, options);
    text = await answer.text();
    clearTimeout(patience);
  } catch {
    clearTimeout(patience);
    if (mine === latest) part.removeAttribute("aria-busy");
    say(part, "The server does not answer: is topklm explore still running?");
    return null;
  }
  if (mine !== latest) return null;
  part.removeAttribute("aria-busy");
  const page = new DOMParser().parseFromString(text, "text/html");
  const fresh = page.querySelector(selector);
  if (!fresh) {
    say(part, page.querySelector("[role=alert]")?.textContent ?? text.trim().slice(0, 200));
    return null;
  }
  const focused = part.contains(document.activeElement) ? pathTo(document.activeElement) : null;
  part.replaceWith(document.adoptNode(fresh));
  if (focused) fresh.querySelector(focused)?.focus({ preventScroll: true });
  document.title = page.title;
  if (push) history.pushState({ selector }, "", answer.url);
  makeTabs(fresh);
  restore();
  return fresh;
}

function say(part, message, role = "alert") {
  part.querySelector(":scope > .passing")?.remove();
  const notice = document.createElement("p");
  notice.className = role === "alert" ? "notice passing" : "quiet passing";
  notice.setAttribute("role", role);
  notice.textContent = message;
  part.append(notice);
}

// How the focused element will be found again in the part that takes its place.
function pathTo(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  if (element.name) return `[name="${CSS.escape(element.name)}"]`;
  if (element.tagName === "BUTTON") return "button";
  const sorted = element.closest("th");
  return sorted ? `th:nth-child(${sorted.cellIndex + 1}) a` : element.tagName.toLowerCase();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-fragment]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  replace(link.dataset.fragment, link.href, {}, true);
});

document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form[data-fragment]");
  if (!form) return;
  event.preventDefault();
  const content = new URLSearchParams(new FormData(form));
  if (form.method === "post") {
    const isLabel = form.dataset.fragment === "#label";
    const wasOpen = isLabel && form.closest("details")?.open;
    const push = form.dataset.fragment === "#prompt" || form.dataset.fragment === "#own-text";
    const fresh = await replace(form.dataset.fragment, form.action, { method: "POST", body: content }, push);
    if (isLabel && fresh) fresh.querySelector("[data-saved]").textContent = "saved";
    if (wasOpen && fresh) fresh.querySelector("details").open = true;
    return;
  }
  for (const [name, value] of [...content]) if (!value) content.delete(name, value);
  const query = content.toString();
  replace(form.dataset.fragment, form.getAttribute("action") + (query ? `?${query}` : ""), {}, true);
});

// Filters apply at once.
document.addEventListener("change", (event) => {
  event.target.closest("form.filters[data-fragment]")?.requestSubmit();
});

addEventListener("popstate", () => location.reload());
