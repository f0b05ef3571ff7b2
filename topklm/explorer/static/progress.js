// How far the work is that makes more figures; a page that shows nothing else opens when there is more to show.

const box = document.querySelector("[data-progress]");

const time = (seconds) => `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} left`;

async function look() {
  let facts;
  try {
    facts = await (await fetch("/api/progress")).json();
  } catch {
    said("The server does not answer: the terminal of topklm explore says why.");
    return;
  }
  if (facts.made !== Number(box.dataset.made)) {
    // A page that somebody reads is not taken from under their eyes.
    if (Number(box.dataset.made) === 0) location.reload();
    else offer(facts.problem || "More figures are there.");
    return;
  }
  if (facts.done) return box.remove();
  box.querySelector("[data-stage]").textContent = facts.stage;
  const { share, seconds_left: left } = facts;
  const parts = share === null ? [] : [`${Math.round(100 * share)} %`];
  if (left !== null) parts.push(time(left));
  box.querySelector("[data-left]").textContent = parts.join(", ");
  const bar = box.querySelector("progress");
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  setTimeout(look, 1000);
}

const said = (text) => (box.querySelector("[data-said]").textContent = text);

function offer(text) {
  const again = document.createElement("a");
  again.href = location.href;
  again.textContent = "Show them";
  box.querySelector("progress").remove();
  box.querySelector("p").remove();
  box.querySelector("[data-said]").replaceChildren(`${text} `, again);
}

if (box?.querySelector("[data-said]")) look();
