// The slider over the steps of a trace: says its step while it moves, and goes there when it is let go.

document.addEventListener("input", ({ target }) => {
  if (!target.dataset?.steps) return;
  const name = target.dataset.names.split(" ")[target.value];
  target.setAttribute("aria-valuetext", name);
  target.parentElement.querySelector("output").textContent = `step ${Number(name).toLocaleString("en")}`;
});
document.addEventListener("change", ({ target }) => {
  if (target.dataset?.steps) location.assign(target.dataset.steps.split(" ")[target.value]);
});
